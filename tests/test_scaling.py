"""Scaling studies: points and what grows, refusals before any start, the runs of a study, resuming and stopping."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from every import every
from launching import REPOSITORY
from scaling_inputs import NOWHERE, environment, make_request, plan, record_all, record_run, start, write_study

from fedmoe_ds.errors import EXIT_LOST, EXIT_STOPPED, EXIT_USER_ERROR, UserError
from fedmoe_ds.studies.resources import check_capacity, cores, step_options
from fedmoe_ds.studies.runner import Outcome, Runner, locked
from fedmoe_ds.studies.scaling import Request
from fedmoe_ds.studies.scaling.point import in_order, plan_points
from fedmoe_ds.studies.scaling.study import read_study

STUDIES = REPOSITORY / "configs" / "scaling"


@pytest.fixture
def request_(corpus: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Request:
    return make_request(corpus, tmp_path_factory.getbasetemp() / "shapes", tmp_path)


@pytest.mark.parametrize("name", ["weak", "strong", "ep_size", "clients", "experts", "top_k"])
def test_the_shipped_studies_are_sound(name: str) -> None:
    study = read_study(STUDIES / f"{name}.yaml")
    points = plan_points(study, STUDIES / f"{name}.yaml", Path("runs"), [])
    configs = [point.config for point in points]
    assert study.name == name and [point.value for point in points] == study.values
    clients = [config.data.partition.clients for config in configs]
    expected = {"weak": [4, 8, 16], "clients": study.values}.get(name, [8] * len(points))
    assert clients == expected
    if name == "ep_size":
        assert [config.topology.ep_size for config in configs] == study.values
    if name == "experts":
        assert [config.adapters.moe and config.adapters.moe.experts for config in configs] == study.values
    if name == "top_k":
        assert [[tier.top_k for tier in config.federation.tiers or []] for config in configs] == [[k] for k in study.values]
    assert len({config.foundation.model_dump_json() for config in configs}) == 1, "one foundation in the cache"


def test_what_grows_is_counted_per_cluster_or_rank(request_: Request) -> None:
    keys: dict[str, Any] = {"axis": "ranks", "values": [2, 4], "scaling": "weak", "grows": {"data.partition.clients": 3}}
    keys["set"] = {"topology.ep_size": 2}
    write_study(request_.config.parent, **keys)
    assert [point.config.data.partition.clients for point in plan(request_)] == [3, 6]
    write_study(request_.config.parent, **keys, per="rank")
    assert [point.config.data.partition.clients for point in plan(request_)] == [6, 12]


def test_ep_size_runs_on_fixed_ranks_or_on_fixed_clusters(request_: Request) -> None:
    keys: dict[str, Any] = {"axis": "ep_size", "values": [1, 2, 4], "scaling": "strong"}
    write_study(request_.config.parent, **keys, ranks=8)
    assert [point.ranks for point in plan(request_)] == [8, 8, 8]
    write_study(request_.config.parent, **keys, clusters=3)
    assert [point.ranks for point in plan(request_)] == [3, 6, 12]


def test_points_are_listed_for_an_array(request_: Request) -> None:
    assert start(replace(request_, points=True)) == (0, "0 ranks-1 1\n1 ranks-2 2")


def test_repeats_differ_in_their_place_alone(request_: Request) -> None:
    first, second = (run.config.model_dump() for run in plan(request_)[1].runs)
    assert (first.pop("name"), second.pop("name")) == ("ranks-2-r0", "ranks-2-r1") and first == second


GROWS = {"scaling": "weak", "grows": {"data.partition.clients": 4}}
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown axis": ({"axis": "rank", "values": [1]}, r"study\.yaml: axis: rank: expected one of ranks, ep_size, clients, .*k"),
    "no values": ({"axis": "clients", "values": []}, r"values: \[\]: expected list of integer"),
    "falling values": ({"axis": "clients", "values": [2, 2]}, r"values: \[2, 2\]: must rise"),
    "neither weak nor strong": ({"axis": "ranks", "values": [1]}, "scaling: missing; say weak or strong"),
    "clients that scale": ({"axis": "clients", "values": [1], "scaling": "strong"}, "scaling: strong: the axis clients itself"),
    "weak without growth": ({"axis": "ranks", "values": [1], "scaling": "weak"}, "grows: missing"),
    "strong with growth": ({"axis": "ranks", "values": [1], **GROWS, "scaling": "strong"}, "grows: .*only weak scaling"),
    "ranks on the axis ranks": ({"axis": "ranks", "values": [1], "ranks": 2, "scaling": "strong"}, "ranks: 2: is the axis"),
    "clusters elsewhere": ({"axis": "clients", "values": [1], "clusters": 2}, "clusters: 2: belongs to the axis ep_size"),
    "the axis in set": (
        {"axis": "clients", "values": [1], "set": {"data.partition.clients": 2}},
        "set: data.partition.clients",
    ),
    "unknown key": ({"axis": "clients", "values": [1], "repeat": 2}, "repeat: unknown key; did you mean 'repeats'"),
    "no base": ({"axis": "clients", "values": [1], "base": "nowhere.yaml"}, r"config: .*nowhere\.yaml: no such file"),
    "no such key": ({"axis": "clients", "values": [1], "set": {"local.lrr": 1}}, r"^local\.lrr: unknown key"),
    "one round": ({"axis": "clients", "values": [1], "set": {"federation.rounds": 1}}, r"^federation\.rounds: 1: the first"),
    "ep_size that does not divide": (
        {"axis": "ep_size", "values": [1, 3], "ranks": 4, "scaling": "strong"},
        r"^topology\.ep_size: 3: the world of 4 ranks is not divisible",
    ),
    "experts that do not divide": (
        {"axis": "ep_size", "values": [1, 3], "clusters": 1, "scaling": "strong"},
        r"^topology\.ep_size: 3: .*8 experts",
    ),
    "more experts than the model has": ({"axis": "k", "values": [1, 64]}, r"^federation\.tiers"),
    "experts of a sparse model": ({"axis": "experts", "values": [8]}, r"^adapters\.moe: nano-olmoe has experts of its own"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_before_anything_starts(request_: Request, name: str) -> None:
    keys, message = MISTAKES[name]
    write_study(request_.config.parent, **keys)
    with pytest.raises(UserError, match=message) as caught:
        start(request_)
    assert "\n" not in str(caught.value)
    assert request_.output is not None and not request_.output.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": Path("nowhere.yaml")}, "^--config: nowhere.yaml: cannot be read"),
        ({"point": 2}, "^--point: 2: the study has the points 0 to 1"),
        ({"overrides": ["output=x"]}, "^override: output: is decided by --output"),
        ({"report": Path("nowhere/x.md")}, "^--report: nowhere/x.md: cannot be written"),
        ({"hardware": "nowhere.json"}, "nowhere.json"),
    ],
)
def test_mistakes_on_the_command_line(request_: Request, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        start(replace(request_, **changes))


@pytest.mark.parametrize(
    ("ranks", "tasks", "expected"),
    [
        (1, "8(x4)", "--nodes=1 --ntasks=1 --distribution=plane=8"),
        (8, "8(x4)", "--nodes=1 --ntasks=8 --distribution=plane=8"),
        (9, "8(x4)", "--nodes=2 --ntasks=9 --distribution=plane=8"),
        (32, "8(x4)", "--nodes=4 --ntasks=32 --distribution=plane=8"),
        (4, "3,1(x2)", "--nodes=2 --ntasks=4 --distribution=plane=3"),
        (9, "4,4", "--ntasks=9"),
        (2, None, "--ntasks=2"),
    ],
)
def test_a_point_fills_the_first_nodes(ranks: int, tasks: str | None, expected: str) -> None:
    environment = {"SLURM_JOB_ID": "1"} | ({} if tasks is None else {"SLURM_TASKS_PER_NODE": tasks})
    assert step_options(ranks, environment) == expected.split()


def test_the_ranks_of_a_point_are_started_so(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    """By srun, which would otherwise go by the allocation's tasks per node."""
    tools = request_.config.parent / "bin"
    tools.mkdir()
    (tools / "srun").write_text('#!/bin/bash\necho "$@" "${SLURM_NTASKS_PER_NODE-unset}"\nexit 3\n')
    (tools / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    here = environment(SLURM_JOB_ID="1", SLURM_TASKS_PER_NODE="2(x4)", SLURM_NTASKS_PER_NODE="2")
    run = plan(request_)[1].runs[0]
    Runner(NOWHERE, here, lambda text: None, by_slurm=True).run([run])
    said = Path(f"{run.folder}.log").read_text().split()
    assert said[:3] == ["--nodes=1", "--ntasks=2", "--distribution=plane=2"] and said[-1] == "unset"


def test_an_allocation_of_several_kinds_of_nodes_is_refused() -> None:
    with pytest.raises(UserError, match=r"^SLURM_HET_SIZE: 2: a heterogeneous job, .*; ask for nodes of one kind"):
        check_capacity("ranks-4", 4, {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_HET_SIZE": "2"})


def test_an_allocation_needs_a_task_per_rank() -> None:
    check_capacity("ranks-4", 4, {"SLURM_NTASKS": "2"})  # no allocation: a name that was left over
    check_capacity("ranks-4", 4, {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"})
    with pytest.raises(UserError, match=r"^--ntasks: 2: the point ranks-4 needs 4 ranks"):
        check_capacity("ranks-4", 4, {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2"})
    assert cores({"SLURM_JOB_ID": "1", "SLURM_JOB_CPUS_PER_NODE": "72(x2),36"}) == 180
    assert cores({}) == len(os.sched_getaffinity(0))


def test_points_are_shuffled_within_a_repeat(request_: Request) -> None:
    """Each repeat has all values once, in an order that the study's seed decides; some order is not that of the axis."""
    values = [1, 2, 4, 8]
    study = read_study(write_study(request_.config.parent, axis="clients", values=values, repeats=6))
    points = plan(request_)
    orders = [[run.label for run in in_order(study, points)][4 * repeat :][:4] for repeat in range(6)]
    labels = [f"clients-{value}" for value in values]
    assert every(sorted(order) == labels for order in orders) and len({tuple(order) for order in orders}) > 1
    assert [run.seed for run in in_order(study, points)] == [repeat for repeat in range(6) for _ in values]
    other = study.model_copy(update={"order_seed": 1})
    assert in_order(study, points) == in_order(study, points) != in_order(other, points)
    assert in_order(study, points[:1]) == list(points[0].runs)


def test_a_value_is_measured_five_times_by_default(tmp_path: Path) -> None:
    (tmp_path / "bare.yaml").write_text("{base: base.yaml, axis: clients, values: [1]}")
    assert read_study(tmp_path / "bare.yaml").repeats == 5


def test_finished_runs_are_not_started_again(request_: Request) -> None:
    record_all(request_, [(6.0, 4.0), (3.0, 3.75)])
    notes: list[str] = []
    code, text = start(request_, notes=notes)
    assert code == 0 and notes == ["4 of 4 runs are finished already"]
    assert request_.output is not None and text.splitlines()[-1] == f"report: {request_.output / 'scaling.md'}"
    assert start(replace(request_, point=0)) == (0, "")
    assert not list(request_.output.glob("*.log")), "no command was started"


def test_only_what_is_missing_is_started(request_: Request) -> None:
    first, second = plan(request_)
    record_run(first, 0, 6.0)
    record_run(second, 0, 3.0, ended=2)  # asked to stop after its second round
    script = request_.config.parent / "command.py"
    script.write_text("import sys\nprint(*sys.argv[1:])\nsys.exit(3)\n")
    alone = [replace(run, ranks=1) for run in second.runs]  # of plain python: the deepspeed launcher takes seconds to import
    outcome = Runner(script, environment(), lambda text: None).run([*first.runs, *alone])
    assert outcome.codes.keys() == {"ranks-1-r1", "ranks-2-r0", "ranks-2-r1"} and outcome.exit_code == 1
    log = Path(f"{second.runs[0].folder}.log").read_text()
    assert log == f"--config {second.runs[0].folder}.yaml --resume auto\n"
    assert not Path(f"{first.runs[0].folder}.log").exists()


@pytest.mark.parametrize(
    ("program", "code", "reason"),
    [
        ("sys.stderr.write('error: a: b: c\\n'); sys.exit(2)", 2, "a: b: c"),
        (f"sys.exit({EXIT_LOST})", EXIT_LOST, "it said nothing"),
        (f"sys.exit({EXIT_STOPPED})", EXIT_STOPPED, None),
        ("__import__('os').abort()", 1, "killed by SIGABRT"),
        (
            "print('TypeError: x', '[time] [ERROR] [launch.py:259:sigkill_handler] code = 1', sep='\\n'); sys.exit(1)",
            1,
            "TypeError: x",
        ),
    ],
)
def test_exit_codes_of_the_ranks_become_those_of_the_study(
    request_: Request, program: str, code: int, reason: str | None
) -> None:
    script = request_.config.parent / "command.py"
    script.write_text(f"import sys\n{program}\n")
    outcome = Runner(script, environment(), lambda text: None).run(plan(request_)[0].runs)
    assert outcome.exit_code == code
    assert set(outcome.reasons.values()) == ({reason} if reason else set())
    logs = list(Path(plan(request_)[0].runs[0].folder).parent.glob("*.log"))
    assert len(logs) == (1 if code == EXIT_STOPPED else 2), "a stop of the ranks is a stop of the study"


def test_failures_of_several_kinds_are_just_failures() -> None:
    assert Outcome({"a": 2, "b": EXIT_LOST}).exit_code == 1 and Outcome({"a": 2, "b": 2}).exit_code == 2
    assert Outcome({"a": 1}, stopped=True).exit_code == EXIT_STOPPED and Outcome().exit_code == 0
    assert [Outcome({"a": code}, stopped=True).exit_code for code in (2, EXIT_LOST)] == [2, EXIT_LOST]
    assert Outcome({"a": EXIT_LOST, "b": 2, "c": 1}, stopped=True).exit_code == 2, "which no script requeues"


@contextlib.contextmanager
def soon(number: signal.Signals, mark: Path, times: int) -> Iterator[None]:
    """Send this process a signal once a file is there, and again, while the block runs."""

    done = threading.Event()

    def send() -> None:
        while not mark.exists():
            if done.wait(0.02):
                return
        for _ in range(times):
            if not done.is_set():
                os.kill(os.getpid(), number)
            done.wait(0.2)

    # Whoever listens in the block puts this handler back; a signal that comes too late then does nothing to pytest.
    before = signal.signal(number, lambda *_: None)
    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        signal.signal(number, before)


@pytest.mark.parametrize(("number", "times"), [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGUSR1, 2)])
def test_a_signal_stops_the_run_and_starts_no_other(request_: Request, number: signal.Signals, times: int) -> None:
    """The command deafens itself at first, as a rank that still imports does, and must be asked again.

    SIGUSR1 may come twice: a scheduler's own and that of its job script.
    """
    script = request_.config.parent / "command.py"
    script.write_text(
        "import signal, sys, time, pathlib\n"
        "mark = pathlib.Path(sys.argv[2] + '.mark')\n"
        "mark.write_text('up')\n"
        "time.sleep(0.5)\n"
        "def stop(number, frame):\n    mark.write_text('saved')\n    sys.exit(75)\n"
        "signal.signal(signal.SIGUSR1, stop)\n"
        "time.sleep(60)\n"
    )
    marks = [Path(f"{run.folder}.yaml.mark") for point in plan(request_) for run in point.runs]
    with soon(number, marks[0], times):
        before = signal.getsignal(number)
        outcome = Runner(script, environment(), lambda text: None).run([run for point in plan(request_) for run in point.runs])
        assert signal.getsignal(number) is before
    assert outcome.exit_code == EXIT_STOPPED and not outcome.codes
    assert [mark.read_text() if mark.exists() else None for mark in marks] == ["saved", None, None, None]


@pytest.mark.parametrize("code", [EXIT_USER_ERROR, EXIT_LOST, EXIT_STOPPED, 0, -signal.SIGKILL])
def test_what_a_stopped_run_counts_is_the_studys(code: int, request_: Request) -> None:
    """One stop too many, or a stop before anything was begun, must reach the batch script; a kill after a signal need not."""
    script = request_.config.parent / "command.py"
    script.write_text(
        "import os, signal, sys, time, pathlib\n"
        f"leave = lambda *_: os.kill(os.getpid(), {-code}) if {code} < 0 else (print('error: too many'), sys.exit({code}))\n"
        "signal.signal(signal.SIGUSR1, leave)\n"
        "pathlib.Path(sys.argv[2] + '.mark').write_text('up')\n"
        "time.sleep(60)\n"
    )
    runs, notes = plan(request_)[0].runs, list[str]()
    with soon(signal.SIGUSR1, Path(f"{runs[0].folder}.yaml.mark"), 1):
        outcome = Runner(script, environment(), notes.append).run(runs)
    counted = code in (EXIT_USER_ERROR, EXIT_LOST)
    assert outcome.stopped and outcome.exit_code == (code if counted else EXIT_STOPPED)
    assert outcome.codes == ({"ranks-1-r0": code} if counted else {}), "the other run was not started"
    assert notes[-1].startswith("ranks-1-r0: failed: too many (" if counted else "ranks-1-r0: stopped after round 0")


def test_a_folder_of_another_study_is_refused(request_: Request) -> None:
    record_all(request_, [(6.0, 4.0), (3.0, 3.75)])
    with pytest.raises(UserError, match=r"^local\.max_steps: 7: .*ranks-1-r0 was run with 3; set it back"):
        start(replace(request_, overrides=["local.max_steps=7"]))
    write_study(request_.config.parent, axis="clients", values=[4], ranks=2)
    (point,) = plan(request_)
    record_run(replace(point, runs=(replace(point.runs[0], ranks=1),)), 0, 4.0)
    with pytest.raises(UserError, match=r"^ranks: 2: .*clients-4-r0 was run on 1; set it back"):
        start(request_)


def test_a_run_is_never_started_twice_at_once(request_: Request) -> None:
    run = plan(request_)[0].runs[0]
    with locked(run.folder), pytest.raises(UserError, match="is at work there; wait or end it"):
        Runner(NOWHERE, environment(), lambda text: None).run([run])
