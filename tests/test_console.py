"""--log, --quiet and --verbose: what is said, on which rank, and where it is kept."""

from __future__ import annotations

import argparse
import io
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from every import every

from fedmoe_ds import terminal
from fedmoe_ds.commands.console import logging_options, show_ending, start_console
from fedmoe_ds.distributed.supervisor import restartable_command
from fedmoe_ds.errors import UserError
from fedmoe_ds.report import Progress

ENDING = ["tier  perplexity\n----  ----------\n4     3.14", "digest: abc", "run: runs/x"]
STAMP = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d{4} ")


@pytest.fixture(autouse=True)
def voice() -> Iterator[terminal.Voice]:
    yield terminal.voice
    terminal.voice.log_to(None)
    terminal.voice.quiet, terminal.voice.verbose, terminal.voice.rank = False, False, 0


def start(*options: str, rank: int = 0) -> None:
    parser = argparse.ArgumentParser()
    logging_options(parser)
    start_console(parser.parse_args(list(options)), rank)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def speak(rank: int = 0, stream: io.StringIO | None = None) -> None:
    """As a run does it."""
    with Progress(enabled=rank == 0, stream=stream, interval=0.0) as progress:
        progress.note("2 ranks; client \x1b[2J")
        progress.detail("cache: /c")
        progress.start_round(1, 1, 1)
        progress.wave_done(1, 1, tokens=100, seconds=0.5)
        progress.end_round("3 clients")
    if rank == 0:
        show_ending(ENDING)


def logged(path: Path) -> list[str]:
    lines = path.read_text().splitlines()
    assert every(STAMP.match(line) for line in lines), lines
    return [STAMP.sub("", line) for line in lines]


ALL = ["2 ranks; client \\x1b[2J", "round 1/1  wave 1/1", "round 1/1  3 clients"]


def test_without_options_nothing_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    start()
    speak()
    out, err = capsys.readouterr()
    assert out.splitlines() == "\n".join(ENDING).splitlines() and "cache" not in err
    assert [line[11:].split("  200")[0] for line in err.splitlines()] == ALL


@pytest.mark.parametrize("amount", ["--quiet", None])
def test_a_log_has_what_the_terminal_has_and_more(
    tmp_path: Path, amount: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "run.log"
    for _ in range(2):  # a run that is resumed
        start("--log", str(path), *([amount] if amount else []))
        speak()
        terminal.note("error: no")
        terminal.voice.log_to(None)
    out, err = capsys.readouterr()
    shown = ENDING[-2:] if amount else ENDING
    assert out.splitlines() == "\n".join([*shown, *shown]).splitlines()
    assert (err.splitlines() == ["error: no"] * 2) == (amount is not None)
    once = [*(line for line in ALL), *"\n".join(ENDING).splitlines(), "error: no"]
    lines = [line.split("  200")[0] for line in logged(path)]
    assert lines[0].startswith("rank 0 on ")
    assert lines == 2 * [lines[0], *once]
    assert stat.S_IMODE(path.stat().st_mode) & 0o111 == 0


def test_verbose_ranks_say_who_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    start("--verbose", rank=3)
    speak(rank=3)
    out, err = capsys.readouterr()
    lines = [re.sub(r"^\[\d\d:\d\d:\d\d\] ", "", line) for line in err.splitlines()]
    assert out == "" and len(lines) == 4 and every(line.startswith("[rank 3] ") for line in lines)
    assert lines[1] == "[rank 3] cache: /c"


@pytest.mark.parametrize("rank", [0, 1, 12])
def test_a_log_per_rank_and_of_rank_0_alone(tmp_path: Path, rank: int, capsys: pytest.CaptureFixture[str]) -> None:
    start("--log", str(tmp_path / "run-%r.log"), rank=rank)
    speak(rank=rank)
    assert [path.name for path in tmp_path.iterdir()] == [f"run-{rank}.log"]
    assert logged(tmp_path / f"run-{rank}.log")[1] == ALL[0]
    assert (capsys.readouterr().err == "") == (rank > 0), "other ranks write nothing elsewhere"
    terminal.voice.log_to(None)
    start("--log", str(tmp_path / "one.log"), rank=rank)
    speak(rank=rank)
    assert (tmp_path / "one.log").exists() == (rank == 0)


def test_a_live_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The log has lines where the terminal has a bar; a quiet terminal has neither."""
    monkeypatch.setenv("TERM", "xterm")
    start("--log", str(tmp_path / "bar.log"))
    stream = Terminal()
    speak(stream=stream)
    assert "wave 1/1" in stream.getvalue() and "round 1/1" in stream.getvalue()
    lines = logged(tmp_path / "bar.log")
    assert [line for line in lines if line.startswith(("round 1/1", "2 ranks"))] == [ALL[0], ALL[2]]
    assert not [line for line in lines if "\x1b" in line]
    terminal.voice.log_to(None)
    start("--quiet")
    silent = Terminal()
    speak(stream=silent)
    assert silent.getvalue() == ""


def test_a_stop_is_told_to_the_quiet_too(capsys: pytest.CaptureFixture[str]) -> None:
    start("--quiet")
    show_ending(["table", "stopped by SIGTERM with a checkpoint", "digest: d", "run: r"])
    said = capsys.readouterr()
    assert said.out == "digest: d\nrun: r\n" and said.err == "stopped by SIGTERM with a checkpoint\n"


def test_a_log_needs_a_name() -> None:
    with pytest.raises(UserError, match=r"^--log: '': names no file"):
        start("--log", "")


@pytest.mark.parametrize("name", ["folder", "file/run.log", "link", "pipe", "closed/run.log", "a\0b"])
def test_a_log_that_cannot_be_written_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "closed").write_text("")
    with pytest.raises(UserError, match=r"^--log: .*: cannot be written: .*; name a file in a folder of yours$") as caught:
        start("--log", str(tmp_path / name))
    assert caught.value.exit_code == 2 and (tmp_path / "file").read_text() == ""


def test_a_disk_that_fills_up_ends_the_log_not_the_run(voice: terminal.Voice, capsys: pytest.CaptureFixture[str]) -> None:
    voice.log_to(open("/dev/full", "a"))  # noqa: SIM115  (closed by the voice)
    for _ in range(3):
        terminal.note("goes on")
    assert capsys.readouterr().err.splitlines() == [
        "--log: cannot be written any more: No space left on device; the run goes on without it",
        *["goes on"] * 3,
    ]


def test_options_are_one_or_the_other_and_reach_every_rank(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        start("--quiet", "--verbose")
    assert "not allowed with" in capsys.readouterr().err
    options = ["--config", "c.yaml", "--ranks", "2", "--log", "run-%r.log", "--quiet"]
    assert restartable_command("launch/train.py", options)[2:] == ["--config", "c.yaml", "--log", "run-%r.log", "--quiet"]
