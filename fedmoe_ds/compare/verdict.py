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
    tier: str
    answer: Answer
    difference: Spread | None


def judge(expectations: Sequence[Expectation], comparison: Comparison) -> list[Verdict]:
    """Every expectation at every tier of the top-k that it names.

    `within spread`: the mean difference is no larger than its sample standard deviation over seeds. `not tested`: a method, a
    tier or a figure is not there.
    """
    return [
        _verdict(expectation, tier, comparison)
        for expectation in expectations
        for top_k in expectation.tiers
        for tier in comparison.tiers_at(top_k)
    ]


def _verdict(expectation: Expectation, tier: str, comparison: Comparison) -> Verdict:
    left, right = expectation.sides
    difference = comparison.log_ratio(left, right, tier, expectation.metric)
    if difference is not None and expectation.more_than_at is not None:
        peers = comparison.tiers_at(expectation.more_than_at)
        # Of several tiers of that top-k none is the one that is meant.
        other = comparison.log_ratio(left, right, peers[0], expectation.metric) if len(peers) == 1 else None
        shared = set(difference.values) & set(other.values) if other is not None else set()
        values = {seed: difference.values[seed] - other.values[seed] for seed in sorted(shared)} if other is not None else {}
        difference = Spread(values) if values else None
    if difference is None:
        return Verdict(expectation, tier, "not tested", None)
    if not is_clear(difference):
        return Verdict(expectation, tier, "within spread", difference)
    return Verdict(expectation, tier, "held" if difference.mean < 0 else "did not hold", difference)
