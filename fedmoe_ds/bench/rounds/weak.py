"""Round weak: twice the clients on two ranks, one cluster each, against one rank; tokens per second and rank.

Runs on one and on two ranks alternate, because a machine does not stay equally fast for minutes.
Two cores of one machine share its caches and its memory: what that alone costs is shown by two processes that train a wave each
at the same time and know nothing of each other.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

from fedmoe_ds.bench.harness.process import Worker, workers
from fedmoe_ds.bench.harness.repeats import paired
from fedmoe_ds.bench.harness.system import OURS
from fedmoe_ds.bench.harness.table import Row
from fedmoe_ds.bench.harness.workload import Workload
from fedmoe_ds.bench.rounds.jobs import RoundJobs, Timed

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


def weak_rows(jobs: RoundJobs, alone: Timed, together: Timed, machine: list[float], peak: float) -> list[Row]:
    """Efficiency: tokens per second and rank over those of one rank, by turn."""
    one, two = alone.token_seconds(), together.token_seconds()
    efficiency = [ratio / RANKS for ratio in paired(one, two)]
    rows = [
        _row(jobs, ALONE, 1, [1.0], one, alone.peak_mib),
        _row(jobs, OURS, RANKS, efficiency, two, together.peak_mib),
        _row(jobs, STRANGERS, RANKS, machine, None, peak),
    ]
    del rows[0]["samples"]["value"]  # it is one by definition
    rows[1] |= {"target": TARGET, "of_machine": statistics.median(efficiency) / statistics.median(machine)}
    return rows


def _row(jobs: RoundJobs, system: str, ranks: int, values: list[float], token_seconds: list[float] | None, peak: float) -> Row:
    samples = {"value": values} | ({"tokens_per_s": [1.0 / one for one in token_seconds]} if token_seconds else {})
    return {
        "part": PART,
        "shape": jobs.load.shape.name,
        "system": system,
        "figure": f"{ranks} ranks: tokens/s per rank over one rank's",
        "value": statistics.median(values),
        "target": None,
        "samples": samples,
        "tokens_per_s": statistics.median(samples["tokens_per_s"]) if token_seconds else None,
        "peak_mib": peak,
        "floor_share": None,
        "ranks": ranks,
        **jobs.load.facts(),
        "clients": jobs.load.clients * ranks,
    }


def machine_efficiency(jobs: RoundJobs, rounds: int = 4) -> tuple[list[float], float]:
    """(time of a wave alone over that of two at once in alternating rounds, peak MiB)."""
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
        return ratios, both[0].ask(do="peak")


def _seconds(running: list[Worker], stage: str) -> float:
    """Mean wall seconds of waves that start at the same time."""
    for worker in running:
        worker.send(do="train", stage=stage)
    return statistics.fmean(worker.receive()["time"]["wall"] for worker in running)
