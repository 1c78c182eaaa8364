"""To target: the target of a seed's runs, and what it takes two methods to get there: virtual time, or energy.

Targets are what the runs name (`devices.target_perplexity`, `devices.target_accuracy`); where they name none, the perplexity
that every method has reached at some time: of a seed's runs the worst of their best.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedmoe_ds.report.device_time import reached
from fedmoe_ds.report.history import Event
from fedmoe_ds.studies.compare.aggregate import Comparison
from fedmoe_ds.studies.spread import Spread

COSTS = {"virtual_time": "virtual_time", "joules": "joules_total"}
"""What may be compared, and the field of an evaluation that has it."""


def target_of(comparison: Comparison, tier: str, seed: int, metric: str) -> float | None:
    """What is looked for in the runs of a seed."""
    runs = [record for record in comparison.records if record.seed == seed and tier in record.courses]
    named = {record.targets[metric] for record in runs if metric in record.targets}
    if named:
        # Several only where somebody sets it method by method: then the easiest is what all can be asked for.
        return max(named) if metric == "perplexity" else min(named)
    if metric != "perplexity" or any(record.targets for record in runs):
        return None
    worst = max((_best(record.courses[tier]) for record in runs), default=math.inf)
    return worst if math.isfinite(worst) else None


def cost_ratio(comparison: Comparison, left: str, right: str, tier: str, cost: str) -> Spread | None:
    """log(left / right) of the cost until the seed's target is reached, by seed.

    None where a run of the two has not got there, or where its target costs nothing: that of the foundation.
    """
    spent: dict[str, dict[int, float]] = {left: {}, right: {}}
    for record in comparison.records:
        if record.label in spent and tier in record.courses:
            spent[record.label][record.seed] = _cost(comparison, record.courses[tier], tier, record.seed, COSTS[cost])
    seeds = sorted(spent[left].keys() & spent[right].keys())
    if not seeds or any(not 0 < side[seed] < math.inf for side in spent.values() for seed in seeds):
        return None
    return Spread({seed: math.log(spent[left][seed] / spent[right][seed]) for seed in seeds})


def _cost(comparison: Comparison, rows: Sequence[Event], tier: str, seed: int, field: str) -> float:
    """Infinite where no target is reached; of perplexity and accuracy the one that the runs have, perplexity first."""
    for metric in ("perplexity", "accuracy"):
        goal = target_of(comparison, tier, seed, metric)
        if goal is not None:
            row = reached(rows, metric, goal)
            return math.inf if row is None else float(row[field])
    return math.inf


def _best(rows: Sequence[Event]) -> float:
    known = [float(value) for row in rows if (value := row.get("perplexity")) is not None]
    return min(known, default=math.inf)
