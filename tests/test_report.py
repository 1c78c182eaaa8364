"""Metrics, progress and the report page: what a run leaves behind is complete, exact and safe to open."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from every import every

from fedmoe_ds.errors import UserError
from fedmoe_ds.report import MetricsLog, Progress, final_table, read_metrics, write_report

TIERS = (4, 2, 1)
HOSTILE = '<script>alert("x")</script>'
VOID = {"meta", "input", "br"}


def record_run(folder: Path, *, clients: int = 6, rounds: int = 3, labels: int = 3, finish: bool = True) -> None:
    """Write the events of a small run as the federation writes them; client 0 has a hostile name."""
    names = [HOSTILE, *(f"client {index}" for index in range(1, clients))]
    draws = np.random.default_rng(0)
    with MetricsLog(folder / "metrics.jsonl") as log:
        ranks = [{"rank": r, "host": "node", "cluster": r // 2, "shard": r % 2, "experts": "0-3"} for r in range(4)]
        sizes = {"world_size": 4, "clusters": 2, "ep_size": 2, "clients": clients, "num_experts": 8, "top_k": 4}
        log.write("run", name=folder.name, method="flame", layers=2, tiers=TIERS, topology=ranks, seed=0, **sizes)
        holdings = [
            {"name": name, "samples": 9, "sequences": 5, "tokens": np.int64(100 * (i + 1)), "top_k": TIERS[i % 3]}
            for i, name in enumerate(names)
        ]
        counts = draws.integers(0, 9, (clients, labels)) + 1
        log.write("data", clients=holdings, distribution={"labels": ["a & b", "<i>", "c"][:labels], "counts": counts})
        record_evaluations(log, 0)
        for round_ in range(1, rounds + 1):
            for i, name in enumerate(names):
                broken = round_ == 2 and i == 1
                losses = {"loss_first": 3.0, "loss_last": math.nan if broken else np.float32(2.5)}
                status = "non-finite" if broken else "ok"
                tier = TIERS[i % 3]
                log.write("client", round=round_, client=name, top_k=tier, steps=4, tokens=64, status=status, **losses)
            phases = {"schedule": 0.01, "train": 2.0, "aggregate": 0.1, "evaluate": 0.4, "checkpoint": 0.2}
            speed = {"tokens": 64 * clients, "seconds": 2.71, "tokens_per_s": 32.0 * clients, "waves": 2}
            log.write("round", round=round_, participants=clients, dropped=int(round_ == 2), phases=phases, **speed)
            for tier in TIERS:
                log.write("experts", round=round_, tier=tier, activation=draws.dirichlet(np.ones(8), size=2))
            record_evaluations(log, round_)
        if finish:
            log.write("end", rounds=rounds, digest="ab" * 32, seconds=12.5)
    (folder / "config.yaml").write_text("name: demo\nmethod:\n  name: flame  # </pre><script>\n")


def record_evaluations(log: MetricsLog, round_: int) -> None:
    for tier in TIERS:
        for split in ("global", "clients"):
            scores = {"perplexity": 90.0 / (1 + round_) / tier, "accuracy": min(0.1 + 0.05 * round_, 0.9), "loss": 2.0}
            log.write("eval", round=round_, tier=tier, split=split, tokens=512, **scores)


class Page(HTMLParser):
    """Checks that every element is closed in order and collects what the page refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.headings: list[str] = []
        self.scripts = 0
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data")]
        self.scripts += tag == "script"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def test_metrics_round_trip_converts_numpy_and_writes_null_for_non_finite(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "a" / "metrics.jsonl"
    with MetricsLog(path) as log:
        values: dict[str, Any] = {
            "x": np.float32(0.5),
            "n": np.int64(7),
            "grid": np.array([[1.0, np.nan]]),
            "flag": np.True_,
        }
        log.write("probe", nan=math.nan, infinity=-math.inf, nested={"a": (np.float64("inf"), "é")}, **values)
    (event,) = read_metrics(path)
    assert event.pop("time") > 1e9
    expected = {"x": 0.5, "n": 7, "grid": [[1.0, None]], "flag": True, "nan": None, "infinity": None}
    assert event == {"event": "probe", **expected, "nested": {"a": [None, "é"]}}
    with MetricsLog(path) as log, pytest.raises(TypeError, match="object"):
        log.write("probe", thing=object())
    assert len(read_metrics(path)) == 1


def test_truncate_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write("round", round=1)
        position = log.position()
        log.write("round", round=2)
    assert position < path.stat().st_size
    with MetricsLog(path) as log:
        log.truncate(position)
        log.write("resume", round=1)
    assert [(event["event"], event["round"]) for event in read_metrics(path)] == [("round", 1), ("resume", 1)]
    with MetricsLog(path) as log, pytest.raises(UserError, match="shorter"):
        log.truncate(10_000)


def test_a_torn_last_line_is_never_read_nor_continued(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"event":"run"}\n{"event":"rou')
    assert [event["event"] for event in read_metrics(path)] == ["run"]
    with MetricsLog(path) as log:
        log.write("round", round=1)
    assert [event["event"] for event in read_metrics(path)] == ["run", "round"]


FULL_DISK = """
import resource, sys
from pathlib import Path
from fedmoe_ds.report.metrics import MetricsLog
log = MetricsLog(Path(sys.argv[1]))
log.write("round", round=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (log.position() + 20, resource.RLIM_INFINITY))
try:
    log.write("round", round=2)
except OSError:
    sys.exit(3)
"""


def test_a_line_that_does_not_fit_on_the_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], check=False, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert path.read_bytes().endswith(b"}\n") and [event["round"] for event in read_metrics(path)] == [1]


@pytest.mark.parametrize(("line", "message"), [("{oops\n", "line 2: is not JSON"), ("[1]\n", "line 2: is no event")])
def test_a_damaged_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event":"run"}\n' + line)
    with pytest.raises(UserError, match=message):
        read_metrics(path)


@pytest.mark.parametrize(
    "shape", [{}, {"clients": 60, "rounds": 30}, {"clients": 1, "rounds": 1}, {"labels": 1, "finish": False}]
)
def test_report_is_one_well_formed_page_with_every_section(tmp_path: Path, shape: dict[str, Any]) -> None:
    record_run(tmp_path, **shape)
    target = write_report(tmp_path)
    assert target == tmp_path / "report.html"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "metrics.jsonl", "report.html"]
    text = target.read_text(encoding="utf-8")
    page = Page(text)
    wanted = [
        "Results",
        "Convergence per tier",
        "How the data lie on clients",
        "Expert activation",
        "Where the time went",
    ]
    assert page.headings == [*wanted, "Clients", "Topology", "Configuration"]
    assert every(reference.startswith("#") for reference in page.references)
    assert "http://" not in text and "https://" not in text and "url(" not in text and "@import" not in text
    assert 'class="empty"' not in text


def test_report_escapes_everything_that_comes_from_the_run(tmp_path: Path) -> None:
    record_run(tmp_path)
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert HOSTILE not in text and "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;" in text
    assert "</pre><script>" not in text
    assert Page(text).scripts == 2, "the page's own script and the activation data"
    assert "<i>" not in text and "a &amp; b" in text
    data = text.split('id="activation-data">')[1].split("</script>")[0]
    assert json.loads(data)["rounds"] == [1, 2, 3]


def test_report_names_updates_that_were_left_out(tmp_path: Path) -> None:
    record_run(tmp_path)
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "1 client update left out (not finite, or out of memory): " in text and "client 1 (round 2)" in text


def test_report_of_a_run_that_has_just_begun_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"event":"run","name":"young"}\n{"event":"a later version\'s event"}\n')
    page = Page(text := write_report(tmp_path).read_text(encoding="utf-8"))
    assert "Results" in page.headings and "Nothing has been evaluated yet." in text and "not finished" in text


def test_report_tells_a_figure_that_was_not_finite_from_a_missing_one(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.write("eval", round=0, tier=2, split="global", perplexity=9.0, accuracy=0.1)
        log.write("eval", round=1, tier=2, split="global", perplexity=math.inf)
    text = write_report(tmp_path).read_text(encoding="utf-8")
    Page(text)
    assert ">not finite</td>" in text and ">–</td>" in text


def test_command_rebuilds_the_report_and_refuses_other_folders(tmp_path: Path) -> None:
    record_run(tmp_path)
    command = [sys.executable, "-m", "fedmoe_ds.report"]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / "report.html") and Path(done.stdout.strip()).exists()
    refused = subprocess.run([*command, str(tmp_path / "nowhere")], capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "does not exist" in refused.stderr


def test_final_table_is_aligned_and_pairs_foundation_with_last_round(tmp_path: Path) -> None:
    record_run(tmp_path)
    head, rule, *rows = final_table(read_metrics(tmp_path / "metrics.jsonl")).splitlines()
    assert len({len(line) for line in (head, rule, *rows)}) == 1
    assert [row.split()[:2] for row in rows[:3]] == [["global", "4"], ["global", "2"], ["global", "1"]]
    assert [row.split()[0] for row in rows[3:]] == ["clients"] * 3
    assert rows[0].split()[2:] == ["22.50", "5.62", "0.250", "10%", "25%", "+15", "21-29%"]


def test_final_table_tells_missing_from_not_finite() -> None:
    before = {"round": 0, "tier": 1, "split": "global", "perplexity": None, "accuracy": 0.5}
    row = final_table([before]).splitlines()[-1]
    assert row.split("  ")[0] == "global" and "not finite" in row and row.split()[-1] == "-"


def drive(progress: Progress) -> None:
    with progress:
        progress.note("reading [data]")
        progress.start_round(1, 2, 2)
        progress.wave_done(1, 2, tokens=100, seconds=0.5)
        progress.wave_done(2, 2, tokens=100, seconds=0.5)
        progress.end_round("k=4 perplexity 12.3")


def test_progress_writes_plain_lines_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    drive(Progress(stream=stream, interval=0.0))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4 and every(line[0] == "[" and line[9:11] == "] " for line in lines)
    assert lines[0].endswith("reading [data]")
    assert "round 1/2  wave 1/2  200 tokens/s  ETA 0:00:0" in lines[1]
    assert "round 1/2  k=4 perplexity 12.3" in lines[3]


def test_progress_spares_wave_lines_but_never_round_lines() -> None:
    stream = io.StringIO()
    drive(Progress(stream=stream, interval=3600.0))
    assert [("wave" in line, "perplexity" in line) for line in stream.getvalue().splitlines()[1:]] == [(False, True)]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_draws_a_bar_on_a_terminal_and_leaves_standard_output_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    drive(Progress(stream=stream))
    assert "round 1/2" in stream.getvalue() and "wave 2/2" in stream.getvalue()
    assert "reading [data]" in stream.getvalue()
    assert capsys.readouterr().out == ""


def test_disabled_progress_is_silent() -> None:
    stream = Terminal()
    drive(Progress(enabled=False, stream=stream))
    assert stream.getvalue() == ""
