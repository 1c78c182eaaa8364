"""docs/performance.md, the table of targets and the run of all measurements. No timing is asserted."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedmoe_ds.bench import suite, table
from fedmoe_ds.bench.command import add_json, command_line
from fedmoe_ds.bench.commands import COMMANDS
from fedmoe_ds.bench.document import Document, read_documents
from fedmoe_ds.bench.goals import TARGETS
from fedmoe_ds.bench.reports.page import page_markdown
from fedmoe_ds.bench.reports.targets import NO_REASON, read_reasons, targets_table
from fedmoe_ds.bench.system import BITWISE, OURS
from fedmoe_ds.errors import UserError
from fedmoe_ds.machine import machine_facts

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "launch" / "bench.py"
PAGE = ROOT / "docs" / "performance.md"
FOLDER = ROOT / "docs" / "performance"
GPU = {"name": "NVIDIA H200", "count": 1, "cuda": "12.8"}
Rows = list[dict[str, Any]]


def wave_row(system: str, tokens_per_s: float, **more: Any) -> dict[str, Any]:
    row = {"shape": "e32", "system": system, "tokens_per_s": tokens_per_s, "peak_mib": 500.0, "floor_share": 0.5}
    return {**row, "ratio": 1.0, "cpu_ratio": 1.0, "clients": 8, "sequences": 1, "length": 128, **more}


def round_row(part: str, system: str, value: float, **more: Any) -> dict[str, Any]:
    row = {"part": part, "shape": "e32", "system": system, "value": value, "target": 1.0}
    return {**row, "clients": 8, "steps": 20, "sequences": 1, "length": 128, **more}


WAVE = [wave_row(OURS, 1000.0), wave_row(BITWISE, 800.0), wave_row("peft eager", 100.0), wave_row("peft grouped_mm", 400.0)]


def store(folder: Path, name: str, rows: Rows, benchmark: str = "wave", gpu: dict[str, Any] | None = None) -> None:
    content = table.document(benchmark, f"python launch/bench.py {benchmark}", rows)
    content["machine"]["gpu"] = gpu
    table.write_json(content, folder / f"{name}.json")


def lines_of(documents: list[Document], reasons: dict[str, str] | None = None) -> dict[str, list[str]]:
    """Cells behind the description, by target name."""
    cells = targets_table(documents, reasons or {}).cells
    return {target.name: line[1:] for target, line in zip(TARGETS, cells, strict=True)}


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=280, env={**os.environ, **variables})


def test_the_page_is_what_the_generator_prints() -> None:
    printed = page_markdown(read_documents(FOLDER), read_reasons(FOLDER / "reasons.yaml"))
    assert PAGE.read_text() == printed, "run make docs"


def test_no_target_of_the_page_is_missed_without_a_reason() -> None:
    assert NO_REASON not in PAGE.read_text(), "say why in docs/performance/reasons.yaml"


def test_every_section_says_where_it_comes_from(tmp_path: Path) -> None:
    store(tmp_path, "wave-e32", WAVE)
    store(tmp_path, "another", [wave_row(OURS, 9.0, device="cuda")], gpu=GPU)
    store(tmp_path, "behind", [wave_row(OURS, 7.0)], gpu=GPU)  # a GPU was there, and was not used
    page = page_markdown(read_documents(tmp_path), {})
    places = [page.index(text) for text in ("## CPU", "### wave-e32", "### behind", "## GPU", "### another")]
    assert places == sorted(places)
    section = page[places[1] : places[2]]
    facts = machine_facts()
    assert COMMANDS["wave"].about in " ".join(section.split()) and "```\npython launch/bench.py wave\n```" in section
    assert facts["cpu"] in section and f"torch {facts['versions']['torch']}" in section and "NVIDIA" not in section
    assert "e32: fedmoe_ds runs 1.00 times as fast as peft grouped_mm" in section
    assert "1 x NVIDIA H200, CUDA 12.8" in page[places[4] :]


def test_targets_are_read_from_the_rows(tmp_path: Path) -> None:
    store(tmp_path, "wave-e32", WAVE)
    lines = lines_of(read_documents(tmp_path))
    assert lines["peft-e32"] == [">= 2.00", "2.50", "yes", "peft grouped_mm, 128 tokens per client and step", ""]
    assert lines["floor-e32"][:3] == ["<= 1.30", "2.00", "no"] and lines["floor-e32"][4] == NO_REASON
    assert lines["bitwise-e32"][1:3] == ["1.25", "yes"]
    assert lines["peft-e64"] == [">= 10.0", "not measured", "", "", ""]


def test_reasons_stand_beside_what_is_missed(tmp_path: Path) -> None:
    store(tmp_path, "wave-e32", WAVE)
    reasons = {"floor-e32": "The floor is low.", "peft-e32": "An old excuse.", "peft-e64": "No time."}
    lines = lines_of(read_documents(tmp_path), reasons)
    assert [lines[name][-1] for name in reasons] == ["The floor is low.", "", "No time."]


def test_other_shapes_and_numbers_reach_nothing(tmp_path: Path) -> None:
    store(tmp_path, "wave-e32", [{**row, "shape": "tiny"} for row in WAVE])
    store(tmp_path, "wave-e64", [{**row, "shape": "e64", "dtype": "bfloat16"} for row in WAVE])
    store(tmp_path, "wave-e32-bf16", WAVE)
    store(tmp_path, "round", [round_row("shares", OURS, 0.01, shape="tiny")], "round")
    assert {line[1] for line in lines_of(read_documents(tmp_path)).values()} == {"not measured"}


def test_the_worst_figure_of_a_round_counts(tmp_path: Path) -> None:
    rows = [
        *(round_row("shares", name, value) for name, value in ((OURS, 0.03), (BITWISE, 0.06))),
        *(round_row("k", OURS, value) for value in (1.1, 0.8)),
        *(round_row("weak", name, value) for name, value in (("2 ranks", 0.92), ("4 ranks", 0.85))),
        *(round_row("overhead", name, value) for name, value in (("fedit", 1.1), ("flame", 1.2))),
        round_row("overhead", "peft grouped_mm", 3.0, target=None),
    ]
    store(tmp_path, "round", rows, "round")
    lines = lines_of(read_documents(tmp_path))
    assert lines["outside"][1:3] == ["6.0 %", "no"] and lines["outside"][3].startswith(f"e32, {BITWISE}, 8 clients x 20 steps")
    assert lines["budget"][1:3] == ["20.0 %", "no"]
    assert lines["weak"][1:3] == ["0.850", "no"] and lines["centralised"][1:3] == ["1.20", "no"]


def test_gpu_targets_need_a_wave_on_a_gpu(tmp_path: Path) -> None:
    def rows(**more: Any) -> Rows:
        more = {"shape": "olmoe-7b", "dtype": "bfloat16", "sequences": 4, **more}
        return [wave_row(OURS, 600.0, floor_share=0.42, **more), wave_row("peft grouped_mm", 100.0, floor_share=0.1, **more)]

    store(tmp_path, "wave-olmoe", rows(), gpu=GPU)
    assert lines_of(read_documents(tmp_path))["gpu-share"][1] == "not measured"
    store(tmp_path, "wave-olmoe", rows(device="cuda"), gpu=GPU)
    lines = lines_of(read_documents(tmp_path))
    assert lines["gpu-share"][1:3] == ["42.0 %", "yes"] and lines["gpu-peft-512"][1:3] == ["6.00", "yes"]
    assert lines["gpu-peft-8192"][1] == "not measured"


def test_all_sources_are_measured_by_the_suite() -> None:
    assert {"wave-e32", "wave-e64", "wave-e32-bf16", "wave-e64-bf16", "peers", "round", "aggregate"} <= set(suite.SUITE)
    assert len({target.name for target in TARGETS}) == len(TARGETS)


@pytest.mark.parametrize("name", suite.SUITE)
def test_the_suite_asks_for_what_there_is(name: str) -> None:
    measurement = suite.SUITE[name]
    command = COMMANDS[measurement.benchmark]
    assert command.about and command.stored is None
    parser = argparse.ArgumentParser(exit_on_error=False)
    command.options(parser)
    add_json(parser)
    for arguments in (measurement.arguments, measurement.quick):
        parser.parse_args([*arguments.split()[1:], "--json", "x.json"])


def test_only_takes_names_and_subcommands() -> None:
    assert suite.chosen(None) == list(suite.SUITE)
    assert suite.chosen(["load", "wave"]) == ["wave-e32", "wave-e64", "wave-e32-bf16", "wave-e64-bf16", "load"]
    assert suite.chosen(["wave-e64"]) == ["wave-e64"]
    with pytest.raises(UserError, match=r"--only: wave-e33: .*did you mean 'wave-e32'"):
        suite.chosen(["load", "wave-e33"])


def test_a_failed_measurement_is_one_line_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "bench.py"
    script.write_text(
        "import pathlib, sys\n"
        "if sys.argv[1] == 'bad':\n"
        "    print('error: --rounds: 0: too small', file=sys.stderr)\n"
        "    sys.exit(2)\n"
        "pathlib.Path(sys.argv[3]).touch()\n"
    )
    monkeypatch.setattr(suite, "SCRIPT", script)
    table_of_runs = {"first": suite.Measurement("good", "bad"), "second": suite.Measurement("bad", "good")}
    store(tmp_path, "first", WAVE)  # of an earlier run
    notes: list[str] = []
    assert suite.run_suite(["first", "second"], tmp_path, True, notes.append, table_of_runs) == ["first"]
    assert notes[:3] == [
        "1 of 2: first: python launch/bench.py bad",
        f"first: failed: exit code 2: error: --rounds: 0: too small ({tmp_path}/first.log)",
        "2 of 2: second: python launch/bench.py good",
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"bench.py", "first.log", "second.json"}


def test_where_a_result_was_stored_is_no_part_of_its_command() -> None:
    line = command_line(["wave", "--json", "/somewhere/x.json", "--shape", "e32", "--json=y.json"])
    assert line == "python launch/bench.py wave --shape e32"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "line 1: "),
        ("[]", "not an object"),
        ('{"benchmark": "wave"}', "command: "),
        ('{"benchmark": "wave", "command": "x", "date": "2026-11-21", "machine": {}, "rows": []}', "machine.cpu: "),
        ("\xff", "not text"),
    ],
)
def test_foreign_files_are_one_line(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "odd.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(
        UserError, match=rf"FOLDER: .*odd\.json: not a result of launch/bench\.py \({reason}.*; measure it again"
    ) as found:
        read_documents(tmp_path)
    assert "\n" not in str(found.value)


def test_results_that_cannot_be_shown_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        read_documents(tmp_path / "missing")
    store(tmp_path, "odd", WAVE, benchmark="waves")
    with pytest.raises(UserError, match=r"odd\.json: benchmark: waves: no such subcommand; did you mean 'wave'"):
        page_markdown(read_documents(tmp_path), {})
    store(tmp_path, "odd", [{"shape": "e32", "system": OURS}])
    with pytest.raises(UserError, match=r"odd\.json: its rows lack something that `wave` shows: 'tokens_per_s'"):
        page_markdown(read_documents(tmp_path), {})
    (tmp_path / "odd.json").unlink()
    store(tmp_path, "wave-e32", [{"shape": "e32", "system": OURS}, {"shape": "e32", "system": "peft eager"}])
    with pytest.raises(UserError, match=r"the rows for 'e32: .*' lack something: 'tokens_per_s'"):
        targets_table(read_documents(tmp_path), {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("peft-e33: slow", "peft-e33: no such target; did you mean 'peft-e32'"),
        ("peft-e32:", "peft-e32: must be a sentence"),
        ("slow", "must be lines of `target: reason`"),
        ("- slow", "must be lines of `target: reason`"),
    ],
)
def test_bad_reasons_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "reasons.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_reasons(path)


def test_missing_reasons_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--reasons: .*cannot be read"):
        read_reasons(tmp_path / "reasons.yaml")


@pytest.mark.cluster
def test_everything_is_measured_and_shown(tmp_path: Path) -> None:
    folder = tmp_path / "bench"
    done = run("all", "--quick", "--output", str(folder))
    assert done.returncode == 0, done.stderr
    assert {path.stem for path in folder.glob("*.json")} == set(suite.SUITE) and not list(folder.glob("*.log"))
    assert len(done.stdout.splitlines()) == 1 + len(TARGETS)
    assert done.stdout == targets_table(read_documents(folder), read_reasons(FOLDER / "reasons.yaml")).text() + "\n"
    page = run("page", str(folder))
    assert page.returncode == 0 and all(f"### {name}\n" in page.stdout for name in suite.SUITE), page.stderr


@pytest.mark.cluster
def test_failures_reach_the_exit_code(tmp_path: Path) -> None:
    (tmp_path / "load.json").write_text("{}")
    damaged = run("targets", str(tmp_path))
    assert damaged.returncode == 2 and damaged.stdout == "" and len(damaged.stderr.splitlines()) == 1
    failed = run("all", "--quick", "--only", "aggregate", "--output", str(tmp_path / "without"), PATH=str(tmp_path))
    assert failed.returncode == 1 and len(failed.stdout.splitlines()) == 1 + len(TARGETS)
    assert "aggregate: failed: exit code 2: error: mpirun: it is not in PATH" in failed.stderr.splitlines()[-1]
