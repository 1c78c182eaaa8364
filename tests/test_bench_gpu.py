"""`launch/bench.py gpu`: its steps and limits, what is kept when it is stopped, its page. No timing is asserted."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import conftest
import pytest
import torch
from every import every
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEventAvg

from fedmoe_ds.bench.gpu import checks, speeds, visit
from fedmoe_ds.bench.gpu.command import COMMAND, TOTAL_S, code
from fedmoe_ds.bench.gpu.request import Request, Tell, WrongError
from fedmoe_ds.bench.gpu.steps import STEPS
from fedmoe_ds.bench.harness.document import read_documents
from fedmoe_ds.bench.results.page import page_markdown
from fedmoe_ds.errors import UserError

TESTS = Path(__file__).parent
BENCH = TESTS.parent / "launch" / "bench.py"
STAND_IN = "Stand-in for CUDA"
SCRIPTS = {
    "facts": "tell({'device': 'one', 'memory_gib': 12.34567, 'missing': []}); tell({'right': True, 'cuda': None})",
    "correctness": "tell({'tests': 3, 'failures': 1}); print('Traceback'); print('1 failed: test_it'); sys.exit(1)",
    "floor": "tell({'copy_tb_s': 4.5}); file.write('{\"torn'); file.flush(); time.sleep(60)",
    "grouped": "print('never')",
}
"""Steps as processes that take no time; `floor` has to be ended, in the middle of a line."""
START = "import json, os, signal, sys, time; file = open(sys.argv[1], 'w')\n"
START += "def tell(facts): file.write(json.dumps(facts) + '\\n'); file.flush()\n"


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Scripts in place of the steps' own processes, by name."""
    scripts = dict(SCRIPTS)
    monkeypatch.setattr(
        visit, "module_command", lambda module, name, request, file: [sys.executable, "-S", "-c", START + scripts[name], file]
    )
    return scripts


def rows_of(folder: Path, names: list[str], limit_s: float = 480.0) -> list[dict[str, Any]]:
    return visit.Visit(Request("tiny", str(folder / "model"), str(folder)), "python launch/bench.py gpu", limit_s).run(names)


def arguments(folder: Path, **given: Any) -> argparse.Namespace:
    known = {"steps": ["facts"], "output": folder, "shape": "tiny", "limit": 480, "seed": 0}
    return argparse.Namespace(**{**known, **given})


def test_all_limits_together_are_eight_minutes() -> None:
    assert TOTAL_S == 480 and list(STEPS)[:3] == ["facts", "correctness", "quickstart"]
    left, taken = float(TOTAL_S), []
    for place, step in enumerate(STEPS.values()):  # every step takes all that it may have
        later = [other.limit_s for other in list(STEPS.values())[place + 1 :]]
        taken.append(visit.allowed(step.limit_s, left, sum(later)))
        left -= taken[-1]
    assert taken == [step.limit_s for step in STEPS.values()], "none takes from those behind it"
    assert visit.allowed(20, 480, 100) == 380, "what is left over is for the next"
    assert visit.allowed(20, 12, 100) == 12 and visit.allowed(20, -3, 0) < 0


def test_steps_run_in_order_of_value_and_the_model_before_who_needs_it() -> None:
    assert visit.chosen(["nccl", "memory", "facts"]) == ["facts", "model", "memory", "nccl"]
    assert visit.chosen(["floor", "facts", "floor"]) == ["facts", "floor"] and visit.chosen(list(STEPS)) == list(STEPS)


def test_each_step_is_a_line_and_a_failed_one_ends_nothing(
    tmp_path: Path, stubs: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(visit, "allowed", lambda own, left, reserved: {20.0: 5.0}.get(float(own), 30.0))
    rows = rows_of(tmp_path, ["correctness", "facts", "floor"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["step"], line["error"]) for line in lines] == [
        ("correctness", "1 failed: test_it"),
        ("facts", None),
        ("floor", "over its limit of 5 s"),
    ]
    assert [line["found"] for line in lines] == [
        [{"tests": 3, "failures": 1}],
        [{"device": "one", "memory_gib": 12.34567, "missing": []}, {"right": True, "cuda": None}],
        [{"copy_tb_s": 4.5}],
    ], "what was told before the end is kept"
    assert (tmp_path / visit.LINES).read_text().splitlines() == [json.dumps(line) for line in lines]
    assert code(rows) == 1 and code(rows[1:2]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {visit.LINES, visit.DOCUMENT, "correctness.log", "floor.log"}


def test_what_has_no_time_left_says_so(tmp_path: Path, stubs: dict[str, str]) -> None:
    (row,) = rows_of(tmp_path, ["facts"], limit_s=1.0)
    assert row["error"] == "not run: the 1 s of the visit are over" and row["found"] == []


def test_a_stop_keeps_all_results(tmp_path: Path, stubs: dict[str, str]) -> None:
    stubs["floor"] = "tell({'copy_tb_s': 4.5}); os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # as launch/bench.py does
    try:
        with pytest.raises(SystemExit):
            rows_of(tmp_path, ["facts", "floor", "grouped"])
    finally:
        signal.signal(signal.SIGTERM, before)
    (document,) = read_documents(tmp_path)
    kept = [(row["step"], row["error"], len(row["found"])) for row in document.rows]
    assert kept == [("facts", None, 2), ("floor", "stopped", 1)]


def test_a_step_that_tells_nothing_has_failed(tmp_path: Path, stubs: dict[str, str]) -> None:
    stubs["facts"] = ""
    assert [row["error"] for row in rows_of(tmp_path, ["facts"])] == ["it ended well, and told nothing"]


def test_nothing_of_an_earlier_visit_passes_for_this_one(tmp_path: Path) -> None:
    """Also where a step fails, or is not begun."""
    stale = ["correctness.xml", "quickstart/quickstart.yaml", "gpu-wave-24.json", "gpu-wave-384.json", "profile-torch.jsonl"]
    stale += ["profile-triton.jsonl", "nccl.log", "facts.jsonl", visit.DOCUMENT, visit.LINES]
    for name in stale:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "notes.txt").touch()
    request = Request("tiny", str(tmp_path / "model"), str(tmp_path))
    visit.clear(request, ["wave-1", "floor"])  # what other steps have found is of their visit, and says so
    assert {path.name for path in tmp_path.glob("*.*")} == {"notes.txt", *stale[3:8], "correctness.xml"}
    visit.clear(request, list(STEPS))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "quickstart").mkdir()  # `--output runs`
    (tmp_path / visit.LINES).touch()
    with pytest.raises(UserError, match=r"^--output: \S*: holds a folder quickstart, which is no visit's; give another"):
        visit.clear(request, ["quickstart"])
    assert (tmp_path / visit.LINES).exists()


def test_a_stop_waits_until_a_result_is_stored(tmp_path: Path, stubs: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = visit.table.document

    def document(*given: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*given)

    monkeypatch.setattr(visit.table, "document", document)
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        with pytest.raises(SystemExit):
            rows_of(tmp_path, ["facts", "grouped"])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [row["step"] for row in read_documents(tmp_path)[0].rows] == ["facts"]


def pytest_that(monkeypatch: pytest.MonkeyPatch, report: str | None, code: int) -> None:
    """Let the step `correctness` meet a pytest that writes this report and ends with this code."""

    def run_to_end(name: str, command: list[str], *rest: Any, **more: Any) -> None:
        (path,) = [word.partition("=")[2] for word in command if word.startswith("--junitxml=")]
        if report is not None:
            Path(path).write_text(report)
        if code:
            raise RuntimeError(f"pytest ended with exit code {code}")

    monkeypatch.setattr(checks, "run_to_end", run_to_end)


def test_a_pytest_that_crashes_has_not_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request, good = Request("tiny", "", str(tmp_path)), REPORT.format(failures=0, skipped=0, problem="")
    for report, ended, text in ((None, -11, "exit code -11"), (good, 2, "exit code 2"), (None, 0, "has not written it")):
        pytest_that(monkeypatch, report, ended)
        with pytest.raises((RuntimeError, WrongError), match=text):
            checks.correctness(request, Tell(tmp_path / "told"))
        (tmp_path / "correctness.xml").unlink(missing_ok=True)
    pytest_that(monkeypatch, good, 0)
    checks.correctness(request, Tell(tmp_path / "told"))


def profiled(key: str, device: DeviceType, microseconds: float, annotation: bool = False) -> FunctionEventAvg:
    event = FunctionEventAvg()
    event.key, event.count, event.device_type, event.is_user_annotation = key, 2, device, annotation
    event.self_device_time_total = microseconds
    return event


def test_device_time_is_that_of_kernels(tmp_path: Path) -> None:
    """An operator's device time is that of its kernels once more, and an annotation on the device spans many."""
    events = [profiled("aten::mm", DeviceType.CPU, 700.0), profiled("cudaLaunchKernel", DeviceType.CPU, 0.0)]
    events += [profiled("gemm", DeviceType.CUDA, 700.0), profiled("add", DeviceType.CUDA, 300.0)]
    events += [profiled("Optimizer.step", DeviceType.CUDA, 1000.0, annotation=True)]
    tell = Tell(tmp_path / "told")
    speeds._tell_profile("torch", events, tmp_path, tell)
    total, *kernels = tell.told()
    assert (total["device_ms"], total["launches"], total["waits"]) == (1.0, 2, 0)
    assert [(one["kernel"], one["ms"]) for one in kernels] == [("gemm", 0.7), ("add", 0.3)]
    assert len((tmp_path / "profile-torch.jsonl").read_text().splitlines()) == len(events)


def test_the_page_shows_what_was_told_and_no_other_number(tmp_path: Path, stubs: dict[str, str]) -> None:
    rows_of(tmp_path, ["facts", "correctness"])
    tree = json.loads((tmp_path / visit.DOCUMENT).read_text())
    tree["machine"]["gpu"] = {"name": STAND_IN, "count": 1, "cuda": None}  # it says what it is
    for row in tree["rows"]:
        row["seconds"] = 7.0
    (tmp_path / visit.DOCUMENT).write_text(json.dumps(tree))
    page = page_markdown(read_documents(tmp_path), {})
    section = page[page.index("## GPU") :]
    assert COMMAND.about in " ".join(section.split()) and f"1 x {STAND_IN}, CUDA None; " in section
    assert section[section.index("| step") :].splitlines() == [
        "| step | seconds | found |",
        "| --- | --- | --- |",
        "| facts | 7.00 | device one, memory_gib 12.3, missing none |",
        "|  |  | right yes, cuda none |",
        "| correctness | 7.00 | tests 3, failures 1 |",
        "|  |  | failed: 1 failed: test_it |",
    ]


def test_without_a_device_it_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"^gpu: no CUDA device is visible to torch 2\S*, a build .*; run it where a GPU is"):
        COMMAND.run(arguments(tmp_path), lambda line: None)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with pytest.raises(UserError, match=r"^gpu: DS_ACCELERATOR=cpu says to leave GPUs alone; unset it"):
        COMMAND.run(arguments(tmp_path), lambda line: None)
    for given, text in {"limit": "4: too small; use 5", "seed": "-1: too small; use 0", "shape": "dense: unknown"}.items():
        value: Any = text.partition(":")[0]
        with pytest.raises(UserError, match=f"^--{given}: {text}"):
            COMMAND.run(arguments(tmp_path, **{given: value if given == "shape" else int(value)}), lambda line: None)
    with pytest.raises(UserError, match=r"^--seed: 9223372036854775808: too large; use less than 2\^63"):
        COMMAND.run(arguments(tmp_path, seed=2**63), lambda line: None)
    with pytest.raises(UserError, match=r"^--steps: flor: unknown step; did you mean 'floor'"):
        COMMAND.run(arguments(tmp_path, steps=["flor"]), lambda line: None)
    (tmp_path / "file").touch()
    monkeypatch.setattr("fedmoe_ds.bench.gpu.command.check_device", lambda: None)
    with pytest.raises(UserError, match=r"^--output: \S*: cannot be made: "):
        COMMAND.run(arguments(tmp_path / "file" / "below"), lambda line: None)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_facts_name_what_is_missing_and_what_is_outside_of_its_range(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"torch": "2.11.0+cu130", "transformers": "5.17.0", "mpi4py": None}
    real = checks._version
    monkeypatch.setattr(checks, "_version", lambda package: there.get(package, real(package)))
    found = checks.packages()
    assert [re.split("[<>=]", text)[0] for text in found["missing"]] == ["mpi4py"]
    assert every(re.fullmatch(r"torch 2\.11\.0\+cu130, wanted \S+", text) for text in found["outside"]) and found["outside"]


REPORT = """<testsuites><testsuite tests="3" failures="{failures}" errors="0" skipped="{skipped}">
<testcase classname="tests.test_a" name="test_good"/><testcase classname="tests.test_b" name="test_bad">{problem}</testcase>
</testsuite></testsuites>"""


def test_failed_tests_are_named(tmp_path: Path) -> None:
    report, tell = tmp_path / "report.xml", Tell(tmp_path / "told")
    report.write_text(REPORT.format(failures=1, skipped=0, problem='<failure message="assert 1 == 2">long</failure>'))
    assert list(checks._failed(report, tell)) == ["test_bad"]
    assert tell.told()[0]["files"] == ["tests.test_a", "tests.test_b"]
    assert tell.told()[1] == {"test": "test_bad", "problem": "assert 1 == 2"}
    report.write_text(REPORT.format(failures=0, skipped=0, problem=""))
    assert list(checks._failed(report, tell)) == []
    report.write_text(REPORT.format(failures=0, skipped=3, problem="<skipped/>"))
    with pytest.raises(WrongError, match="no test ran on the device"):
        list(checks._failed(report, tell))


def test_tests_for_a_device_are_marked_by_their_reason() -> None:
    marks, added = [pytest.mark.skipif(True, reason=checks.NEEDS_A_DEVICE).mark], list[Any]()
    item: Any = SimpleNamespace(iter_markers=lambda name: marks if name == "skipif" else [], add_marker=added.append)
    conftest.mark_device_tests([item])
    assert added == [pytest.mark.cuda]
    for path in TESTS.rglob("test_*.py"):
        for found in re.findall(r"skipif\(\s*not torch\.cuda\.is_available\(\),\s*reason=([^)]*)\)", path.read_text()):
            assert found.strip(' ",\n') == checks.NEEDS_A_DEVICE, f"{path.name}: `launch/bench.py gpu` would not run it"
    # One that passes without a device would stand for all of them, and nobody would say that no test ran on it.
    texts = [path.read_text() for path in checks.device_tests(TESTS)]
    asked = [found for text in texts for found in re.findall(rf'skipif\((.*?),\s*reason="{checks.NEEDS_A_DEVICE}"\)', text)]
    assert len(asked) >= len(texts) > 4 and set(asked) == {"not torch.cuda.is_available()"}


def visited(folder: Path, *words: str) -> dict[str, list[dict[str, Any]]]:
    """What the steps of a visit to the stand-in have told, by name; all went well. Its documents are in `folder`/results."""
    (folder / "sitecustomize.py").write_text("import fake_cuda\n\nfake_cuda.enable()\n")  # in every process, before torch
    env = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    env["PYTHONPATH"] = os.pathsep.join(map(str, (folder, TESTS, TESTS.parent)))
    command = [sys.executable, str(BENCH), "gpu", "--shape", "tiny", "--limit", "2400", "--output", str(folder / "results")]
    done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=2400, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list((folder / "results").glob("*.log"))
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert (folder / "results" / visit.LINES).read_text().splitlines() == [json.dumps(line) for line in lines]
    return {line["step"]: line["found"] for line in lines}


@pytest.mark.cluster  # slow: a process for every step
def test_a_short_visit_to_the_stand_in(tmp_path: Path) -> None:
    found = visited(tmp_path, "--steps", "nccl", "grouped", "facts")
    assert list(found) == ["facts", "grouped", "nccl"] and found["facts"][0]["device"] == STAND_IN
    assert found["nccl"][0]["backend"] == "nccl" and found["nccl"][-1] == {"no_rows": True, "control": [1, 1, 1]}
    (document,) = read_documents(tmp_path / "results")
    assert document.on_gpu and document.command == "python launch/bench.py gpu --steps nccl grouped facts --shape tiny"


@pytest.mark.sweep  # slower: a hundred seconds
@pytest.mark.timeout(2400)
def test_a_whole_visit_to_the_stand_in(tmp_path: Path) -> None:
    found = visited(tmp_path)
    assert list(found) == list(STEPS) and found["quickstart"][0]["device"] == STAND_IN
    assert found["correctness"][0]["tests"] > found["correctness"][0]["skipped"]
    assert [one["tokens"] for one in found["memory"]] == [24, 96, 192, 384]
    assert {one["system"] for one in found["wave-1"]} == {"fedmoe_ds", "peft grouped_mm"}
    documents = {one.name: one for one in read_documents(tmp_path / "results")}
    assert set(documents) == {"gpu", "gpu-wave-24", "gpu-wave-384"} and every(one.on_gpu for one in documents.values())
    page = page_markdown(list(documents.values()), {})
    assert f"1 x {STAND_IN}" in page and page.count("### gpu") == 3
