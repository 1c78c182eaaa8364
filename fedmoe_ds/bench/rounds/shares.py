"""Round shares: where the time of a round goes, phase by phase, in a run with the default evaluation."""

from __future__ import annotations

import statistics

from fedmoe_ds.bench.harness.command import Note
from fedmoe_ds.bench.harness.repeats import make_row
from fedmoe_ds.bench.harness.system import BITWISE, OURS
from fedmoe_ds.bench.harness.table import Row
from fedmoe_ds.bench.rounds.jobs import PHASES, TRAINING, RoundJobs, Timed, medians
from fedmoe_ds.config import EvaluationConfig

PART = "shares"
TARGET = 0.05
NAMES = {
    "passes": "forward and backward",
    "optimizer": "optimizer",
    "set_up": "wave set-up",
    "reports": "reports",
    "fold": "folding into sums",
    "aggregate": "aggregation and server step",
    "schedule": "schedule",
    "checkpoint": "checkpoint",
    "other": "journal and other",
    "evaluate": "evaluation",
}
MODES = {"fast": OURS, "bitwise": BITWISE}


def measure_shares(jobs: RoundJobs, note: Note) -> list[Row]:
    """One row per mode; shares of a round with the default evaluation, and without any."""
    rows = []
    for mode, system in MODES.items():
        note(f"{jobs.load.shape.name}: {PART}: {mode}")
        evaluation = EvaluationConfig().model_dump(mode="json")
        done = jobs.run(f"shares-{mode}", {"execution": {"reproducible": mode}, "evaluation": evaluation})
        rows.append(shares_row(jobs, system, done))
    return rows


def shares_row(jobs: RoundJobs, system: str, done: Timed) -> Row:
    """A row from the median phases of the timed rounds; what a round has beside training is counted without evaluation."""
    spent = medians(done.rounds)
    alone = [shares({**one.phases, "evaluate": 0.0}) for one in done.rounds]
    whole = [shares(one.phases) for one in done.rounds]
    samples = {"value": [_outside(one) for one in alone], "with_evaluation": [_outside(one) for one in whole]}
    samples["evaluation"] = [one["evaluate"] for one in whole]
    facts = {
        "part": PART,
        "figure": "everything but forward, backward and optimizer",
        "target": TARGET,
        "phase_samples": {name: [one[name] for one in alone] for name in PHASES},
        "phase_samples_with_evaluation": {name: [one[name] for one in whole] for name in PHASES},
        "shares": shares(spent),
        "shares_without_evaluation": shares({**spent, "evaluate": 0.0}),
        "phase_seconds": spent,
        "round_s": statistics.median(one.seconds for one in done.rounds),
        "tokens_per_s": 1.0 / statistics.median(done.token_seconds()),
    }
    return make_row(jobs.load.shape.name, system, done.peak_mib, samples, **facts, **jobs.load.facts())


def _outside(found: dict[str, float]) -> float:
    return 1.0 - sum(found[name] for name in TRAINING)


def shares(spent: dict[str, float]) -> dict[str, float]:
    """Shares of the sum, in the order of the table."""
    total = sum(spent.values())
    return {name: spent[name] / total for name in PHASES}
