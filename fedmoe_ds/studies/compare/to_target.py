"""To target: the target of a seed's runs, and what it takes two methods to get there: rounds, virtual time, or energy.

Targets are what the runs name (`devices.target_perplexity`, `devices.target_accuracy`); where they name none, the perplexity
that every one of them has reached at some time: the worst of their best. A pair is asked for what both of it have reached, so
that no verdict depends on which other methods stand in the study.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from fedmoe_ds.report.device_time import reached
from fedmoe_ds.report.history import Event
from fedmoe_ds.studies.compare.aggregate import Comparison
from fedmoe_ds.studies.compare.record import Record
from fedmoe_ds.studies.spread import Spread

COSTS = {"rounds": "round", "virtual_time": "virtual_time", "joules": "joules_total"}
"""What may be compared, and the field of an evaluation that has it."""
Course = tuple[Record, Sequence[Event]]
"""A run and its evaluations at a tier, in order."""


def target_of(comparison: Comparison, tier: str, seed: int, metric: str) -> float | None:
    """What is looked for in the runs of a seed on simulated devices."""
    runs = [record for record in comparison.records if record.seed == seed and tier in record.courses]
    return _target([(record, record.courses[tier]) for record in runs], metric)


def cost_ratio(comparison: Comparison, left: str, right: str, tier: str, cost: str, over: int = 1) -> Spread | None:
    """log(left / right) of the cost until both have reached the target of the two, by seed.

    None where a run of the two has not got there, or where its target costs nothing: that of the foundation.

    Args:
        over: evaluations whose mean counts as one (`means`).
    """
    spent = {}
    for seed, pair in _pairs(comparison, left, right, tier, cost).items():
        courses = [(record, means(rows, over)) for record, rows in pair]
        spent[seed] = [_cost(courses, rows, COSTS[cost]) for _, rows in courses]
    if not spent or any(not 0 < side < math.inf for sides in spent.values() for side in sides):
        return None
    return Spread({seed: math.log(mine / other) for seed, (mine, other) in spent.items()})


def late_ratio(comparison: Comparison, left: str, right: str, tier: str, over: int) -> Spread | None:
    """log(left / right) of the perplexity of the mean loss over the last evaluations, by seed; None where a run has fewer."""
    pairs = _pairs(comparison, left, right, tier, "rounds")
    ends = {seed: [means(rows, over)[-1:] for _, rows in pair] for seed, pair in pairs.items()}
    values = {seed: [float(row["perplexity"]) for rows in pair for row in rows] for seed, pair in ends.items()}
    if not values or any(len(pair) < 2 or not all(0 < side < math.inf for side in pair) for pair in values.values()):
        return None
    return Spread({seed: math.log(mine / other) for seed, (mine, other) in values.items()})


def means(rows: Sequence[Event], over: int) -> list[Event]:
    """Evaluations that stand for so many successive ones, up to theirs: perplexity by the mean loss, accuracy by its mean.

    The foundation is in no mean. An evaluation after few clients of few labels is noise of which a minimum takes the best.
    """
    if over == 1:
        return list(rows)
    trained = [row for row in rows if row["round"] > 0]
    windows = [trained[end - over : end] for end in range(over, len(trained) + 1)]
    return [{**window[-1], **_mean(window)} for window in windows]


def _mean(window: Sequence[Event]) -> dict[str, float | None]:
    shares = [share for row in window if (share := row.get("accuracy")) is not None]
    return {
        "perplexity": math.exp(statistics.fmean(map(_loss, window))),
        "accuracy": statistics.fmean(shares) if len(shares) == len(window) else None,
    }


def _loss(row: Event) -> float:
    perplexity = row.get("perplexity")
    return math.inf if perplexity is None or not 0 < perplexity < math.inf else math.log(perplexity)


def _pairs(comparison: Comparison, left: str, right: str, tier: str, cost: str) -> dict[int, tuple[Course, Course]]:
    """The evaluations of both sides by seed, of the seeds that both have."""
    sides: dict[str, dict[int, Course]] = {left: {}, right: {}}
    for record in comparison.records:
        course = _course(record, cost)
        if record.label in sides and tier in course:
            sides[record.label][record.seed] = record, course[tier]
    return {seed: (sides[left][seed], sides[right][seed]) for seed in sorted(sides[left].keys() & sides[right].keys())}


def _course(record: Record, cost: str) -> Mapping[str, Sequence[Event]]:
    return record.evaluations if cost == "rounds" else record.courses


def _target(courses: Sequence[Course], metric: str) -> float | None:
    named = {record.targets[metric] for record, _ in courses if metric in record.targets}
    if named:
        # Several only where somebody sets it method by method: then the easiest is what all can be asked for.
        return max(named) if metric == "perplexity" else min(named)
    if metric != "perplexity" or any(record.targets for record, _ in courses):
        return None
    worst = max((_best(rows) for _, rows in courses), default=math.inf)
    return worst if math.isfinite(worst) else None


def _cost(courses: Sequence[Course], rows: Sequence[Event], field: str) -> float:
    """Infinite where no target is reached; of perplexity and accuracy the one that the runs have, perplexity first."""
    for metric in ("perplexity", "accuracy"):
        goal = _target(courses, metric)
        if goal is not None:
            row = reached(rows, metric, goal)
            return math.inf if row is None else float(row[field])
    return math.inf


def _best(rows: Sequence[Event]) -> float:
    known = [float(value) for row in rows if (value := row.get("perplexity")) is not None]
    return min(known, default=math.inf)
