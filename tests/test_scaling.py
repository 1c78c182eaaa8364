"""Scaling studies: points and what grows, refusals before any start, the arithmetic on recorded runs, resuming, outputs."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from launching import REPOSITORY

from fedmoe_ds.compare.runner import locked
from fedmoe_ds.config import dump_config
from fedmoe_ds.errors import EXIT_LOST, EXIT_STOPPED, UserError
from fedmoe_ds.planner import World, load_hardware, predict
from fedmoe_ds.scaling import Request, scale
from fedmoe_ds.scaling.measured import machine_file, measure, timed_rounds
from fedmoe_ds.scaling.point import Point, plan_points
from fedmoe_ds.scaling.room import check_room, cores
from fedmoe_ds.scaling.runner import Outcome, Runner
from fedmoe_ds.scaling.study import read_study

NOWHERE = Path("no-such-script.py")
STUDIES = REPOSITORY / "configs" / "scaling"


def write_study(folder: Path, **keys: Any) -> Path:
    path = folder / "study.yaml"
    path.write_text(json.dumps({"base": "base.yaml", **keys}))
    return path


@pytest.fixture(scope="session")
def base(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A federation that nobody trains here; only its shapes and data are looked at."""
    return {
        "foundation": {"preset": "nano-olmoe", "cache": str(tmp_path_factory.mktemp("shapes"))},
        "federation": {"rounds": 3},
        "local": {"max_steps": 3},
        "data": {"source": str(corpus), "sequence_length": 64, "partition": {"kind": "iid", "clients": 4}},
    }


@pytest.fixture
def request_(base: dict[str, Any], tmp_path: Path) -> Request:
    """Strong scaling over 1 and 2 ranks, two repeats, everything in tmp_path."""
    (tmp_path / "base.yaml").write_text(json.dumps(base))
    study = write_study(tmp_path, axis="ranks", values=[1, 2], scaling="strong", repeats=2)
    return Request(study, tmp_path / "runs")


def plan(request: Request) -> list[Point]:
    assert request.output is not None
    return plan_points(read_study(request.config), request.config, request.output, request.overrides)


def start(request: Request, script: Path = NOWHERE, notes: list[str] | None = None) -> tuple[int, str]:
    return scale(request, script, environment(), (notes if notes is not None else []).append)


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return kept | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} | more


def round_event(number: int, at: float, train: float, **more: Any) -> dict[str, Any]:
    phases = {"schedule": 0.25, "train": train, "aggregate": 0.5, "evaluate": 0.25}
    return {"event": "round", "time": at, "round": number, "tokens": 1200, "phases": phases, "seconds": train + 1.0} | more


def record_run(point: Point, repeat: int, seconds: float, *, digest: str = "ab", ended: int = 3, **more: Any) -> None:
    """Write what a run of three rounds leaves behind: a slow first one, then two of `seconds` from event to event."""
    run = point.runs[repeat]
    topology = [{"rank": rank, "host": "here", "cluster": rank, "shard": 0, "experts": "0-7"} for rank in range(point.ranks)]
    facts = {"world_size": point.ranks, "clusters": point.ranks, "ep_size": 1, "clients": 4, "reproducible": "bitwise"}
    facts |= {"topology": topology, "versions": {"torch": "2.13"}}
    events = [{"event": "run", "time": 90.0, **facts}]
    for number, at in ((1, 100.0), (2, 100.0 + seconds), (3, 100.0 + 2 * seconds)):
        events.append({"event": "client", "time": at, "round": number, "client": "a", "flops": 6.0e9})
        events.append(round_event(number, at, seconds - 2.0, **more))
    events.append({"event": "end", "time": 200.0, "rounds": ended, "digest": digest})
    run.folder.mkdir(parents=True)
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (run.folder / "config.yaml").write_text(dump_config(run.config))
    machine_file(run).write_text(json.dumps({"cores": 1, "cpu": "a CPU", "system_name": "an OS"}))


def record_all(request: Request, seconds: Sequence[Sequence[float]], **more: Any) -> None:
    for point, times in zip(plan(request), seconds, strict=True):
        for repeat, value in enumerate(times):
            record_run(point, repeat, value, **more)


def rows_of(request: Request) -> list[dict[str, str]]:
    assert request.output is not None
    return list(csv.DictReader(io.StringIO((request.output / "scaling.csv").read_text())))


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


def test_an_allocation_needs_a_task_per_rank() -> None:
    check_room("ranks-4", 4, {"SLURM_NTASKS": "2"})  # no allocation: a name that was left over
    check_room("ranks-4", 4, {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"})
    with pytest.raises(UserError, match=r"^--ntasks: 2: the point ranks-4 needs 4 ranks"):
        check_room("ranks-4", 4, {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2"})
    assert cores({"SLURM_JOB_ID": "1", "SLURM_JOB_CPUS_PER_NODE": "72(x2),36"}) == 180
    assert cores({}) == len(os.sched_getaffinity(0))


def test_only_rounds_that_follow_one_of_the_same_start_are_timed() -> None:
    events: list[dict[str, Any]] = [
        {"event": "run", "time": 0.0},
        round_event(1, 10.0, 3.0),
        {"event": "eval", "time": 11.0},
        round_event(2, 14.0, 3.0),
        {"event": "resume", "time": 500.0},
        round_event(3, 510.0, 3.0),
        round_event(4, 513.5, 3.0),
    ]
    assert [(seconds, event["round"]) for seconds, event in timed_rounds(events)] == [(4.0, 2), (3.5, 4)]


def test_phases_add_up_to_the_wall_clock(request_: Request) -> None:
    point = plan(request_)[0]
    tally = {"all_to_all": {"calls": 3, "seconds": 0.5, "bytes": 8}, "all_reduce": {"calls": 1, "seconds": 0.25, "bytes": 8}}
    record_run(point, 0, 6.0, collectives=tally)
    found = measure(point.runs[0])
    assert (found.rounds, found.seconds, found.recorded, found.tokens_per_s) == ((2, 3), 6.0, 5.0, 200.0)
    assert found.phases == {"train": 4.0, "aggregate": 0.5, "evaluate": 0.25, "other": 1.25}
    assert found.collectives == {"all_to_all": 0.5, "all_reduce": 0.25} and found.flops_per_s == 1.0e9
    assert found.peak_mib is None and found.cores == 1


def test_efficiency_by_hand(request_: Request) -> None:
    """1200 tokens a round: 200 and 300 tokens/s on one rank, 400 and 320 on two."""
    record_all(request_, [(6.0, 4.0), (3.0, 3.75)])
    code, text = start(request_)
    rows = rows_of(request_)
    assert code == 0 and [float(row["tokens_per_s"]) for row in rows] == [200.0, 300.0, 400.0, 320.0]
    assert [float(row["efficiency"]) for row in rows] == [0.8, 1.2, 0.8, 0.64]
    assert [(row["value"], row["repeat"], row["cores"], row["timed_rounds"]) for row in rows] == [
        ("1", "0", "1", "2"),
        ("1", "1", "1", "2"),
        ("2", "0", "1", "2"),
        ("2", "1", "1", "2"),
    ]
    assert "1 (shared)" in text and "ranks 2: more ranks than the 1 core of the machine." in text
    assert "100 % ± 28 %" in text and "72 % ± 11 %" in text
    assert "All 4 runs ended with one digest: ab." in text
    assert all(row["predicted_s"] == "" for row in rows), "nothing is predicted without --hardware"


def test_predictions_stand_beside_what_was_measured(request_: Request) -> None:
    """The recorded rounds end a second before the next begins; a prediction is compared with them alone."""
    write_study(request_.config.parent, axis="clients", values=[4])
    (point,) = plan(request_)
    record_run(point, 0, 6.0)
    _, text = start(replace(request_, hardware="cpu"))
    rounds = [predict(point.config, World(1, 1), load_hardware("cpu"), number).round_seconds for number in (2, 3)]
    (row,) = rows_of(request_)
    assert float(row["predicted_s"]) == pytest.approx(sum(rounds) / 2, rel=1e-5)
    assert float(row["predicted_over_measured"]) == pytest.approx(sum(rounds) / 2 / 5.0, rel=1e-5)
    assert "Predictions: the planner with cpu" in text and request_.output is not None
    assert "predicted and measured" in (request_.output / "scaling.svg").read_text()


def test_the_axis_k_compares_flops(request_: Request) -> None:
    write_study(request_.config.parent, axis="k", values=[1, 2], ranks=2)
    for point, seconds in zip(plan(request_), (4.0, 8.0), strict=True):
        record_run(point, 0, seconds)
    start(request_)
    assert [float(row["flops_per_s"]) for row in rows_of(request_)] == [1.5e9, 7.5e8]
    assert [float(row["efficiency"]) for row in rows_of(request_)] == [1.0, 0.5]


def test_efficiency_needs_the_first_value(request_: Request) -> None:
    record_run(plan(request_)[1], 0, 4.0)
    code, text = start(replace(request_, collect=True))
    (row,) = rows_of(request_)
    assert code == 1 and row["efficiency"] == "" and "| ranks-1-r0 | not finished |" in text


def test_different_digests_of_one_federation_are_a_failure(request_: Request) -> None:
    record_all(request_, [(6.0,), (3.0,)])
    record_run(plan(request_)[0], 1, 6.0)
    record_run(plan(request_)[1], 1, 6.0, digest="cd")
    code, text = start(request_)
    assert code == 1 and "NOT THE SAME RESULT: ranks-1-r0 and ranks-2-r1" in text


def test_outputs_hold_tables_and_every_panel(request_: Request) -> None:
    tally = {"all_to_all": {"calls": 3, "seconds": 0.5, "bytes": 8}, "gather": {"calls": 1, "seconds": 0.125, "bytes": 8}}
    record_all(request_, [(6.0, 4.0), (3.0, 3.75)], collectives=tally)
    copy = request_.config.parent / "docs.md"
    code, _ = start(replace(request_, collect=True, report=copy))
    assert code == 0 and request_.output is not None
    report = (request_.output / "scaling.md").read_text()
    assert copy.read_text() == report.replace("(scaling.svg)", "(docs.svg)")
    assert "Measured on: a CPU, 1 cores, an OS; torch 2.13." in report
    assert [row["all_to_all_s"] for row in rows_of(request_)] == ["0.5"] * 4
    drawing = ElementTree.fromstring((request_.output / "scaling.svg").read_text())
    assert copy.with_suffix(".svg").read_text() == (request_.output / "scaling.svg").read_text()
    words = [element.text or "" for element in drawing.iter("{http://www.w3.org/2000/svg}text")]
    titles = [word for word in words if word.startswith(("Throughput", "Efficiency", "Where", "The same"))]
    assert len(titles) == 4 and {"ideal", "measured", "in all-to-all"} <= set(words)


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
    alone = replace(second, ranks=1)  # of plain python: the deepspeed launcher takes seconds to import
    outcome = Runner(script, environment(), lambda text: None).run([first, alone])
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
    outcome = Runner(script, environment(), lambda text: None).run(plan(request_)[:1])
    assert outcome.exit_code == code
    assert set(outcome.reasons.values()) == ({reason} if reason else set())
    logs = list(Path(plan(request_)[0].runs[0].folder).parent.glob("*.log"))
    assert len(logs) == (1 if code == EXIT_STOPPED else 2), "a stop of the ranks is a stop of the study"


def test_failures_of_several_kinds_are_just_failures() -> None:
    assert Outcome({"a": 2, "b": EXIT_LOST}).exit_code == 1 and Outcome({"a": 2, "b": 2}).exit_code == 2
    assert Outcome({"a": 2}, stopped=True).exit_code == EXIT_STOPPED and Outcome().exit_code == 0


@contextlib.contextmanager
def soon(number: signal.Signals, mark: Path, times: int) -> Iterator[None]:
    """Send this process a signal once a file is there, and again."""

    def send() -> None:
        deadline = time.monotonic() + 30
        while not mark.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        for _ in range(times):
            os.kill(os.getpid(), number)
            time.sleep(0.2)

    thread = threading.Thread(target=send)
    thread.start()
    yield
    thread.join()


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
    before = signal.getsignal(number)
    marks = [Path(f"{run.folder}.yaml.mark") for point in plan(request_) for run in point.runs]
    with soon(number, marks[0], times):
        outcome = Runner(script, environment(), lambda text: None).run(plan(request_))
    assert outcome.exit_code == EXIT_STOPPED and not outcome.codes
    assert [mark.read_text() if mark.exists() else None for mark in marks] == ["saved", None, None, None]
    assert signal.getsignal(number) is before


def test_a_folder_of_another_study_is_refused(request_: Request) -> None:
    record_all(request_, [(6.0, 4.0), (3.0, 3.75)])
    with pytest.raises(UserError, match=r"^local\.max_steps: 7: .*ranks-1-r0 was run with 3; set it back"):
        start(replace(request_, overrides=["local.max_steps=7"]))
    write_study(request_.config.parent, axis="clients", values=[4], ranks=2)
    (point,) = plan(request_)
    record_run(replace(point, ranks=1), 0, 4.0)
    with pytest.raises(UserError, match=r"^ranks: 2: .*clients-4-r0 was run on 1; set it back"):
        start(request_)


def test_a_run_is_never_started_twice_at_once(request_: Request) -> None:
    point = plan(request_)[0]
    with locked(point.runs[0].folder), pytest.raises(UserError, match="is at work there; wait or end it"):
        Runner(NOWHERE, environment(), lambda text: None).run([point])
