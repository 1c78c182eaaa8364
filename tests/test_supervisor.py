"""What the supervisor does with exit codes and signals. The ranks are small programs; real runs are in tests/cluster."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_ds.checkpoint.skipped_clients import NAME, findings_of
from fedmoe_ds.distributed.supervisor import Supervisor, restartable_command, verdict
from fedmoe_ds.errors import EXIT_LOST, EXIT_STOPPED, EXIT_USER_ERROR


def supervise(
    folder: Path, body: str, ranks: int = 2, restarts: int = 2, learnt: Callable[[], frozenset[object]] = frozenset
) -> tuple[int, list[str], list[str]]:
    """(exit code, notes, starts) of ranks that run `body`; `start` counts from 0, `rank` is the rank."""
    program = f"""
        import os, pathlib, signal, sys, time
        rank, log = int(os.environ["RANK"]), pathlib.Path({str(folder / "starts")!r})
        start = sum(line.startswith(f"{{rank}} ") for line in log.read_text().splitlines()) if log.exists() else 0
        with log.open("a") as file:
            file.write(f"{{rank}} {{' '.join(sys.argv[1:])}}\\n")
    """
    script = folder / "rank.py"
    script.write_text(textwrap.dedent(program) + textwrap.dedent(body))
    notes: list[str] = []
    code = Supervisor([sys.executable, str(script)], ranks, restarts, 0.0, notes.append, learnt=learnt).run()
    return code, notes, (folder / "starts").read_text().splitlines()


def test_a_killed_rank_is_started_again_and_resumes(tmp_path: Path) -> None:
    body = """
        if start == 0 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        sys.exit(76 if start == 0 else 0)
    """
    code, notes, starts = supervise(tmp_path, body)
    assert code == 0 and notes == ["restart 1 of 2, from the last checkpoint"]
    assert sorted(starts) == sorted(["0 ", "1 ", "0 --resume auto", "1 --resume auto"])


def test_restarts_end(tmp_path: Path) -> None:
    code, notes, starts = supervise(tmp_path, "sys.exit(76)", ranks=1, restarts=2)
    assert code == EXIT_LOST and len(starts) == 3
    assert notes[-1].startswith("--max-restarts: 2: the job was lost once more")


@pytest.mark.parametrize(("restarts", "starts"), [(1, 6), (0, 1)])
def test_a_loss_that_has_taught_the_job_something_is_not_counted(tmp_path: Path, restarts: int, starts: int) -> None:
    """128 sequences are cut to 8 in four starts; then the same is written down again, which is a loss as any other."""
    findings = tmp_path / NAME
    findings.write_text("of an earlier run\n")
    body = f"""
        with pathlib.Path({str(findings)!r}).open("a") as file:
            file.write(f"{{max(128 >> start, 8)}}\\n")
        sys.exit(76)
    """
    code, notes, started = supervise(tmp_path, body, ranks=1, restarts=restarts, learnt=lambda: findings_of([tmp_path]))
    assert code == EXIT_LOST and len(started) == starts + (restarts > 0)
    assert sum("with smaller passes" in note for note in notes) == (5 if restarts else 0)


@pytest.mark.parametrize("code", [1, EXIT_USER_ERROR, EXIT_STOPPED])
def test_what_a_restart_cannot_mend_is_left(tmp_path: Path, code: int) -> None:
    found, notes, starts = supervise(tmp_path, f"sys.exit({code} if rank == 1 else 0)")
    assert (found, notes, sorted(starts)) == (code, [], ["0 ", "1 "])


def test_a_signal_reaches_every_rank_once(tmp_path: Path) -> None:
    """The ranks end with a checkpoint; nothing is started again."""
    body = """
        def say(word):
            with log.open("a") as file:
                file.write(f"{rank} {word}\\n")
        def stop(number, frame):
            say(signal.Signals(number).name)
            sys.exit(75)
        signal.signal(signal.SIGUSR1, stop)
        say("ready")
        if rank == 0:
            while log.read_text().count("ready\\n") < 2:
                time.sleep(0.01)
            os.kill(os.getppid(), signal.SIGINT)
        time.sleep(60)
    """
    code, notes, starts = supervise(tmp_path, body)
    assert code == EXIT_STOPPED and not notes
    assert sorted(starts) == ["0 ", "0 SIGUSR1", "0 ready", "1 ", "1 SIGUSR1", "1 ready"]


def test_a_signal_before_the_ranks_hear_is_a_stop(tmp_path: Path) -> None:
    """It ends them as it ends any program; nobody was lost, and nothing is started again."""
    body = """
        if rank == 0:
            while len(log.read_text().splitlines()) < 2:
                time.sleep(0.01)
            os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(60)
    """
    code, notes, starts = supervise(tmp_path, body)
    assert code == EXIT_STOPPED and sorted(starts) == ["0 ", "1 "]
    assert notes == ["stopped by SIGTERM before the ranks had begun; start the same command again"]


@settings(deadline=None)  # other work on the machine is not this function's
@given(st.lists(st.sampled_from([0, 1, 2, 75, 76, -9, None]), min_size=1))
def test_verdict_prefers_what_the_user_must_act_on(codes: list[int | None]) -> None:
    found = verdict(codes)
    lost = any(code is None or code < 0 or code == EXIT_LOST for code in codes)
    for code, present in ((2, 2 in codes), (1, 1 in codes), (76, lost), (75, 75 in codes)):
        if present:
            assert found == code
            return
    assert found == 0


def test_a_rank_does_not_supervise() -> None:
    command = restartable_command("train.py", ["--config", "a.yaml", "--ranks", "4", "--max-restarts=2", "name=x"])
    assert command == [sys.executable, "train.py", "--config", "a.yaml", "name=x"]


@pytest.mark.parametrize(
    ("options", "launcher", "message"),
    [
        (["--ranks", "0"], {}, "error: --ranks: 0: must be at least 1"),
        (["--max-restarts", "-1"], {}, "error: --max-restarts: -1: must be at least 0"),
        (["--max-restarts", "1"], {"RANK": "0", "WORLD_SIZE": "1"}, "error: --ranks: 1: environment has started the ranks"),
    ],
)
def test_bad_input(options: list[str], launcher: dict[str, str], message: str) -> None:
    script = Path(__file__).parent.parent / "launch" / "train.py"
    config = script.parent.parent / "configs" / "quickstart.yaml"
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, str(script), "--config", str(config), *options],
        capture_output=True,
        text=True,
        env=environment | launcher,
    )
    assert done.returncode == EXIT_USER_ERROR and done.stderr.startswith(message), done.stderr
