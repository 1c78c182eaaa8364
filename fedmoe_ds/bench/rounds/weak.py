"""Round weak: twice the clients on two ranks, one cluster each, against one rank; tokens per second and rank.

Runs on one and on two ranks alternate, because a machine does not stay equally fast for minutes.
Two cores of one machine share its caches and its memory: what that alone costs is shown by two processes that train a wave each
at the same time and know nothing of each other.
"""

from __future__ import annotations

import statistics

from fedmoe_ds.bench.harness.command import Note
from fedmoe_ds.bench.harness.program import Program, ask_at_once, workers
from fedmoe_ds.bench.harness.repeats import make_row, paired
from fedmoe_ds.bench.harness.system import OURS
from fedmoe_ds.bench.harness.table import Row
from fedmoe_ds.bench.harness.workload import Workload
from fedmoe_ds.bench.rounds.jobs import RoundJobs, Timed
from fedmoe_ds.bench.wave.measure import WORKER, open_at_once

PART = "weak"
TARGET = 0.9
RANKS = 2
TURNS = 2
ALONE, STRANGERS = f"{OURS}, 1 rank", f"{RANKS} unrelated processes"


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
    facts = {
        "part": PART,
        "figure": f"{ranks} ranks: tokens/s per rank over one rank's",
        "target": None,
        "ranks": ranks,
        **jobs.load.facts(),
        "clients": jobs.load.clients * ranks,
    }
    return make_row(jobs.load.shape.name, system, peak, samples, **facts)


def machine_efficiency(jobs: RoundJobs, rounds: int = 4) -> tuple[list[float], float]:
    """(time of a wave alone over that of two at once in alternating rounds, peak MiB)."""
    load = jobs.load
    workload = Workload(load.shape, min(load.steps, 4), load.sequences, load.length, load.seed)
    with workers(WORKER, ["first", "second"]) as running:
        open_at_once(jobs.model, {name: (program, workload) for name, program in running.items()}, OURS)
        both = list(running.values())
        _seconds(both, "warm-up")
        # Alone and together in turn: a ratio is of two waves that are seconds apart.
        ratios = [_seconds(both[:1], "timed") / _seconds(both, "timed") for _ in range(rounds)]
        return ratios, both[0].ask(do="peak")


def _seconds(running: list[Program], stage: str) -> float:
    """Mean wall seconds of waves that start at the same time."""
    return statistics.fmean(done["time"]["wall"] for done in ask_at_once(running, do="train", stage=stage))
