"""Verdict: what a study says about the orderings that papers report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fedmoe_ds.compare.aggregate import Comparison, Spread, is_clear
from fedmoe_ds.compare.protocol import Expectation

Answer = Literal["held", "did not hold", "within spread", "not tested"]


@dataclass(frozen=True)
class Verdict:
    """One expectation at one tier.

    `difference` is log(left / right) by seed, with `more_than_at` minus the same at that tier; below zero is as expected.
    """

    expectation: Expectation
    tier: int
    answer: Answer
    difference: Spread | None


def judge(expectations: Sequence[Expectation], comparison: Comparison) -> list[Verdict]:
    """Every expectation at every tier it names.

    `within spread`: the mean difference is no larger than its sample standard deviation over seeds. `not tested`: a method, a
    tier or a figure is not there.
    """
    return [_verdict(expectation, tier, comparison) for expectation in expectations for tier in expectation.tiers]


def _verdict(expectation: Expectation, tier: int, comparison: Comparison) -> Verdict:
    left, right = expectation.sides
    difference = comparison.log_ratio(left, right, tier, expectation.metric)
    if difference is not None and expectation.more_than_at is not None:
        other = comparison.log_ratio(left, right, expectation.more_than_at, expectation.metric)
        shared = set(difference.values) & set(other.values) if other is not None else set()
        values = {seed: difference.values[seed] - other.values[seed] for seed in sorted(shared)} if other is not None else {}
        difference = Spread(values) if values else None
    if difference is None:
        return Verdict(expectation, tier, "not tested", None)
    if not is_clear(difference):
        return Verdict(expectation, tier, "within spread", difference)
    return Verdict(expectation, tier, "held" if difference.mean < 0 else "did not hold", difference)
