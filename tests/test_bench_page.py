"""docs/performance.md, the table of targets and the run of all measurements. No timing is asserted."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from every import every

from fedmoe_ds.bench.commands import COMMANDS
from fedmoe_ds.bench.harness.command import JSON, add_options, command_line
from fedmoe_ds.bench.harness.document import Document, read_documents
from fedmoe_ds.bench.harness.repeats import UNKNOWN_MEANS
from fedmoe_ds.bench.harness.system import BITWISE, OURS
from fedmoe_ds.bench.harness.table import document, write_json
from fedmoe_ds.bench.results import suite
from fedmoe_ds.bench.results.goals import TARGETS
from fedmoe_ds.bench.results.page import page_markdown, peft_table
from fedmoe_ds.bench.results.targets_command import NO_REASON, read_reasons, targets_table
from fedmoe_ds.errors import UserError
from fedmoe_ds.machine import machine_facts

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "launch" / "bench.py"
PAGE = ROOT / "docs" / "performance.md"
FOLDER = ROOT / "docs" / "performance"
GPU = {"name": "NVIDIA H200", "count": 1, "cuda": "12.8"}
Rows = list[dict[str, Any]]


def wave_row(system: str, tokens_per_s: float, **more: Any) -> dict[str, Any]:
    """A wave whose repetitions are one per cent apart, against ours at 1000 tokens per second."""
    row = {"shape": "e32", "system": system, "tokens_per_s": tokens_per_s, "peak_mib": 500.0, "floor_share": 0.5}
    row |= {"ratio": 1000.0 / tokens_per_s, "cpu_ratio": 1.0, "clients": 8, "sequences": 1, "length": 128, **more}
    near = (0.99, 1.0, 1.01)
    samples = {name: [factor * row[name] for factor in near] for name in ("tokens_per_s", "floor_share", "ratio", "cpu_ratio")}
    return {"samples": samples, **row}


def round_row(part: str, system: str, value: float, **more: Any) -> dict[str, Any]:
    row = {"part": part, "shape": "e32", "system": system, "figure": "time", "value": value, "target": 1.0}
    samples = {"value": [value * factor for factor in (0.999, 1.0, 1.001)]}
    return {**row, "clients": 8, "steps": 20, "sequences": 1, "length": 128, "samples": samples, **more}


WAVE = [wave_row(OURS, 1000.0), wave_row(BITWISE, 800.0), wave_row("peft eager", 100.0), wave_row("peft grouped_mm", 400.0)]


def store(folder: Path, name: str, rows: Rows, benchmark: str = "wave", gpu: dict[str, Any] | None = None) -> None:
    content = document(benchmark, f"python launch/bench.py {benchmark}", rows)
    content["machine"]["gpu"] = gpu
    write_json(content, folder / f"{name}.json")


def lines_of(documents: list[Document], reasons: dict[str, str] | None = None) -> dict[str, list[str]]:
    """Cells behind the description, by target name."""
    cells = targets_table(documents, reasons or {}).cells
    return {target.name: line[1:] for target, line in zip(TARGETS, cells, strict=True)}


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=800, env={**os.environ, **variables})


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
    assert "fedmoe_ds runs 2.50 (2.48 to 2.52) times as fast as peft grouped_mm" in section
    assert "1 x NVIDIA H200, CUDA 12.8" in page[places[4] :]


def test_targets_are_read_from_the_rows(tmp_path: Path) -> None:
    store(tmp_path, "wave-e32", WAVE)
    lines = lines_of(read_documents(tmp_path))
    where = "peft grouped_mm, 128 tokens per client and step"
    assert lines["peft-e32"] == [">= 2.00", "2.50 (2.48 to 2.52)", "3", "yes", where, ""]
    assert lines["floor-e32"][:4] == ["<= 1.30", "2.00 (1.98 to 2.02)", "3", "no"] and lines["floor-e32"][5] == NO_REASON
    assert lines["bitwise-e32"][1:4] == ["1.25 (1.24 to 1.26)", "3", "not decided"], "its repetitions straddle 1.25"
    assert lines["peft-e64"] == [">= 10.0", "not measured", "", "", "", ""]


def test_runs_that_straddle_a_target_decide_nothing(tmp_path: Path) -> None:
    """One run says 2.5 times, another one 1.9: neither is the answer, however many repetitions the first has."""
    store(tmp_path, "wave-e32", WAVE)
    slow = [wave_row(OURS, 1000.0), wave_row("peft grouped_mm", 1000.0 / 1.9)]
    store(tmp_path, "wave-e32.monday", slow)
    line = lines_of(read_documents(tmp_path))["peft-e32"]
    assert line[1:4] == ["2.20 (1.88 to 2.52)", "6 in 2 runs", "not decided"]
    page = page_markdown(read_documents(tmp_path), {})
    assert "### wave-e32\n" in page and "### wave-e32.monday" not in page
    assert "Other runs, which count for the targets: `wave-e32.monday.json` of 20" in page


@pytest.mark.parametrize("stored", [True, False])
def test_a_single_timing_is_called_one_and_decides_nothing(tmp_path: Path, stored: bool) -> None:
    rows = [wave_row(OURS, 1000.0), wave_row("peft grouped_mm", 10.0)]
    rows[1]["samples"] = {"ratio": [100.0]} if stored else {}
    store(tmp_path, "wave-e32", rows)
    documents = read_documents(tmp_path)
    assert lines_of(documents)["peft-e32"][1:4] == ["100 (one timing)", "1", "not decided"]
    page = page_markdown(documents, {})
    assert ("100.00 (one timing) times as fast" in page) is stored and ("100.00 † times as fast" in page) is not stored
    assert UNKNOWN_MEANS in page, "tokens per second have no repetitions here"


def test_ratios_by_tokens(tmp_path: Path) -> None:
    for sequences, speed in ((1, 400.0), (4, 500.0), (8, 800.0)):
        rows = [wave_row(OURS, 1000.0, sequences=sequences), wave_row("peft grouped_mm", speed, sequences=sequences)]
        store(tmp_path, f"wave-{sequences}", rows)
    cells = peft_table(read_documents(tmp_path)).cells
    assert cells[0] == ["e32", "float32", "2.50 (2.48 to 2.52)", "2.00 (1.98 to 2.02)", "1.25 (1.24 to 1.26)"]
    assert cells[1] == ["e64", "float32", *["not measured"] * 3]
    assert [line[:2] for line in cells[2:]] == [["e32", "bfloat16"], ["e64", "bfloat16"]]
    lines = lines_of(read_documents(tmp_path))
    assert lines["peft-e32"][1] == "2.50 (2.48 to 2.52)", "longer steps reach no target of 128 tokens"


def test_readme_has_the_ratios_of_the_page() -> None:
    table = peft_table(read_documents(FOLDER)).markdown()
    assert table in PAGE.read_text() and table in (ROOT / "README.md").read_text(), "copy the table of the page into README"


def test_reasons_stand_beside_what_is_missed(tmp_path: Path) -> None:
    store(tmp_path, "wave-e32", WAVE)
    reasons = {"floor-e32": "The floor is low.", "peft-e32": "An old excuse.", "peft-e64": "No time."}
    lines = lines_of(read_documents(tmp_path), reasons)
    assert [lines[name][-1] for name in reasons] == ["The floor is low.", "", "No time."]
    line = lines_of(read_documents(tmp_path), {"bitwise-e32": "It varies."})["bitwise-e32"]
    assert (line[3], line[5]) == ("not decided", "It varies.")


def test_other_shapes_and_numbers_reach_nothing(tmp_path: Path) -> None:
    store(tmp_path, "wave-e32", [{**row, "shape": "tiny"} for row in WAVE])
    store(tmp_path, "wave-e64", [{**row, "shape": "e64", "dtype": "float16"} for row in WAVE])
    store(tmp_path, "wave-e32-long", [{**row, "sequences": 4} for row in WAVE])
    store(tmp_path, "round", [round_row("shares", OURS, 0.01, shape="tiny")], "round")
    assert {line[1] for line in lines_of(read_documents(tmp_path)).values()} == {"not measured"}


def test_the_worst_figure_of_a_round_counts(tmp_path: Path) -> None:
    rows = [
        *(round_row("shares", name, value, shares={"evaluate": 0.44}) for name, value in ((OURS, 0.03), (BITWISE, 0.06))),
        *(round_row("k", OURS, value, figure=f"k {value}") for value in (1.1, 0.8)),
        *(round_row("weak", name, value) for name, value in (("2 ranks", 0.92), ("4 ranks", 0.85))),
        *(round_row("overhead", name, value) for name, value in (("fedit", 1.1), ("flame", 1.2))),
        round_row("overhead", "peft grouped_mm", 3.0, target=None),
    ]
    store(tmp_path, "round", rows, "round")
    lines = lines_of(read_documents(tmp_path))
    assert lines["outside"][1:4] == ["6.0 % (6.0 % to 6.0 %)", "3", "no"]
    assert lines["outside"][4].startswith(f"e32, {BITWISE}, 8 clients x 20 steps")
    assert lines["outside"][4].endswith("evaluation, left out here, takes 44 % of a round")
    assert lines["budget"][1:4] == ["20.0 % (19.9 % to 20.1 %)", "3", "no"]
    assert lines["weak"][1:4] == ["0.850 (0.849 to 0.851)", "3", "no"]
    assert lines["centralised"][1:4] == ["1.20 (1.20 to 1.20)", "3", "no"]


def test_a_target_of_several_figures_is_reached_by_all_of_them(tmp_path: Path) -> None:
    near, straddling = round_row("weak", "2 ranks", 0.91), round_row("weak", "4 ranks", 0.95)
    straddling["samples"] = {"value": [0.85, 0.95, 1.05]}
    store(tmp_path, "round", [near, straddling], "round")
    line = lines_of(read_documents(tmp_path))["weak"]
    assert line[1:4] == ["0.950 (0.850 to 1.05)", "3", "not decided"] and "4 ranks" in line[4]


def test_gpu_targets_need_a_wave_on_a_gpu(tmp_path: Path) -> None:
    def rows(**more: Any) -> Rows:
        more = {"shape": "olmoe-7b", "dtype": "bfloat16", "sequences": 4, **more}
        peer = wave_row("peft grouped_mm", 100.0, **{"floor_share": 0.1, "ratio": 6.0, **more})
        return [wave_row(OURS, 600.0, floor_share=0.42, **more), peer]

    store(tmp_path, "wave-olmoe", rows(), gpu=GPU)
    assert lines_of(read_documents(tmp_path))["gpu-share"][1] == "not measured"
    store(tmp_path, "wave-olmoe", rows(device="cuda"), gpu=GPU)
    lines = lines_of(read_documents(tmp_path))
    assert lines["gpu-share"][1:4] == ["42.0 % (41.6 % to 42.4 %)", "3", "yes"]
    assert lines["gpu-peft-512"][1:4] == ["6.00 (5.94 to 6.06)", "3", "yes"]
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
    add_options(parser, [*command.options, JSON])
    for arguments in (measurement.arguments, measurement.quick):
        parser.parse_args([*arguments.split()[1:], "--json", "x.json"])


def test_only_takes_names_and_subcommands() -> None:
    assert suite.chosen(None) == list(suite.SUITE)
    waves = ["wave-e32", "wave-e64", "wave-e32-bf16", "wave-e64-bf16", "wave-e32-tokens", "wave-e64-tokens"]
    assert suite.chosen(["load", "wave"]) == [*waves, "load"]
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
        ("{", "Expecting property name .*: line 1 "),
        ("[]", "not an object"),
        ('{"benchmark": "wave"}', "command: "),
        ('{"benchmark": "wave", "command": "x", "date": "2026-11-21", "machine": {}, "rows": []}', "machine.cpu: "),
        ("\xff", "not UTF-8 text"),
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
    store(tmp_path, "odd", [{"shape": "load", "system": OURS}], benchmark="load")
    with pytest.raises(UserError, match=r"odd\.json: its rows lack something that `load` shows: 'ep_size'"):
        page_markdown(read_documents(tmp_path), {})
    (tmp_path / "odd.json").unlink()
    store(tmp_path, "wave-e32", [{"shape": "e32", "system": OURS}, {"shape": "e32", "system": "peft eager"}])
    with pytest.raises(UserError, match=r"the rows for 'e32: .*' lack something: 'sequences'"):
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
@pytest.mark.timeout(850)
def test_everything_is_measured_and_shown(tmp_path: Path) -> None:
    folder = tmp_path / "bench"
    done = run("all", "--quick", "--output", str(folder))
    assert done.returncode == 0, done.stderr
    assert {path.stem for path in folder.glob("*.json")} == set(suite.SUITE) and not list(folder.glob("*.log"))
    assert len(done.stdout.splitlines()) == 1 + len(TARGETS)
    assert done.stdout == targets_table(read_documents(folder), read_reasons(FOLDER / "reasons.yaml")).text() + "\n"
    page = run("page", str(folder))
    assert page.returncode == 0 and every(f"### {name}\n" in page.stdout for name in suite.SUITE), page.stderr


@pytest.mark.cluster
@pytest.mark.timeout(850)
def test_failures_reach_the_exit_code(tmp_path: Path) -> None:
    (tmp_path / "load.json").write_text("{}")
    damaged = run("targets", str(tmp_path))
    assert damaged.returncode == 2 and damaged.stdout == "" and len(damaged.stderr.splitlines()) == 1
    failed = run("all", "--quick", "--only", "aggregate", "--output", str(tmp_path / "without"), PATH=str(tmp_path))
    assert failed.returncode == 1 and len(failed.stdout.splitlines()) == 1 + len(TARGETS)
    assert "aggregate: failed: exit code 2: error: mpirun: it is not in PATH" in failed.stderr.splitlines()[-1]
