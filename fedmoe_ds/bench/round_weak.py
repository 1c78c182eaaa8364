"""Round weak: twice the clients on two ranks, one cluster each, against one rank; tokens per second and rank.

Runs on one and on two ranks alternate, because a machine does not stay equally fast for minutes.
Two cores of one machine share its caches and its memory: what that alone costs is shown by two processes that train a wave each
at the same time and know nothing of each other.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

from fedmoe_ds.bench.process import Worker, workers
from fedmoe_ds.bench.round_jobs import RoundJobs, Timed
from fedmoe_ds.bench.system import OURS
from fedmoe_ds.bench.table import Row
from fedmoe_ds.bench.workload import Workload

PART = "weak"
TARGET = 0.9
RANKS = 2
TURNS = 2
ALONE, STRANGERS = f"{OURS}, 1 rank", f"{RANKS} unrelated processes"

Note = Callable[[str], None]


def measure_weak(jobs: RoundJobs, note: Note) -> list[Row]:
    """Rows for one rank, for two, and for what the machine has to give."""
    name, clients = jobs.load.shape.name, jobs.load.clients
    note(f"{name}: {PART}: {STRANGERS}")
    machine, peak = machine_efficiency(jobs)
    alone, together = [], []
    for turn in range(TURNS):
        note(f"{name}: {PART}: {clients} clients on 1 rank, run {turn + 1} of {TURNS}")
        alone.append(jobs.run(f"weak-1-{turn}"))
        note(f"{name}: {PART}: {RANKS * clients} clients on {RANKS} ranks, run {turn + 1} of {TURNS}")
        together.append(jobs.run(f"weak-{RANKS}-{turn}", {"data": {"partition": {"clients": RANKS * clients}}}, RANKS))
    return weak_rows(jobs, joined(alone), joined(together), machine, peak)


def joined(runs: list[Timed]) -> Timed:
    """The rounds of all runs, and the largest peak."""
    return Timed([one for run in runs for one in run.rounds], max(run.peak_mib for run in runs))


def weak_rows(jobs: RoundJobs, alone: Timed, together: Timed, machine: float, peak: float) -> list[Row]:
    """Efficiency: tokens per second and rank over those of one rank."""
    one = statistics.median(alone.token_seconds())
    two = statistics.median(together.token_seconds())
    efficiency = one / (RANKS * two)
    return [
        _row(jobs, ALONE, 1, 1.0, None, 1.0 / one, alone.peak_mib),
        _row(jobs, OURS, RANKS, efficiency, TARGET, 1.0 / two, together.peak_mib) | {"of_machine": efficiency / machine},
        _row(jobs, STRANGERS, RANKS, machine, None, None, peak),
    ]


def _row(jobs: RoundJobs, system: str, ranks: int, value: float, target: float | None, speed: float | None, peak: float) -> Row:
    return {
        "part": PART,
        "shape": jobs.load.shape.name,
        "system": system,
        "figure": f"{ranks} ranks: tokens/s per rank over one rank's",
        "value": value,
        "target": target,
        "met": None if target is None else value >= target,
        "tokens_per_s": speed,
        "peak_mib": peak,
        "floor_share": None,
        "ranks": ranks,
        **jobs.load.facts(),
        "clients": jobs.load.clients * ranks,
    }


def machine_efficiency(jobs: RoundJobs, rounds: int = 3) -> tuple[float, float]:
    """(time of a wave alone over that of two at once, peak MiB); median over alternating rounds."""
    load = jobs.load
    workload = Workload(load.shape, min(load.steps, 4), load.sequences, load.length, load.seed)
    with workers(["first", "second"]) as running:
        both = list(running.values())
        for worker in both:
            worker.send(do="open", system=OURS, folder=str(jobs.model), workload=workload.to_json())
        for worker in both:
            worker.receive()
        _seconds(both, "warm-up")
        ratios = [_seconds(both[:1], "timed") / _seconds(both, "timed") for _ in range(rounds)]
        return statistics.median(ratios), both[0].ask(do="peak")


def _seconds(running: list[Worker], stage: str) -> float:
    """Mean wall seconds of waves that start at the same time."""
    for worker in running:
        worker.send(do="train", stage=stage)
    return statistics.fmean(worker.receive()["time"]["wall"] for worker in running)
