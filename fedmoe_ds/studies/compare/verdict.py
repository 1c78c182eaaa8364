"""Verdict: what a study says about the orderings that papers report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fedmoe_ds.studies.compare.aggregate import Comparison
from fedmoe_ds.studies.compare.paired import PairedTest, family_tests
from fedmoe_ds.studies.compare.protocol import Expectation
from fedmoe_ds.studies.compare.record import FAIRNESS
from fedmoe_ds.studies.compare.to_target import COSTS, cost_ratio, late_ratio
from fedmoe_ds.studies.spread import Spread

Answer = Literal["held", "did not hold", "not decided", "not tested"]
EQUAL_FLOPS = 0.02
"""Two methods count as equally expensive where their FLOPs agree within this share in every seed."""


@dataclass(frozen=True)
class Verdict:
    """One expectation at one tier.

    Attributes:
        difference: log(left / right) by seed (`in_points`: left - right), with `more_than_at` minus the same at that tier;
            below zero is as expected.
        test: of that difference, corrected for all orderings of the study that are tested; None with a single seed, and for
            an ordering that is arithmetic.
        flops: log of the FLOPs of left over those of right by seed, at this tier; None where a run did not count them.
    """

    expectation: Expectation
    tier: str
    answer: Answer
    difference: Spread | None
    test: PairedTest | None = None
    flops: Spread | None = None

    @property
    def arithmetic(self) -> bool:
        """Whether it follows from counting: FLOPs are set by k, rank and shapes, no training decides them."""
        return self.expectation.metric == "flops"

    @property
    def in_points(self) -> bool:
        """Whether its difference is one of shares: the worst clients may have none right, and no logarithm."""
        return self.expectation.metric in FAIRNESS

    @property
    def equal_flops(self) -> bool:
        return self.flops is not None and all(abs(math.expm1(v)) <= EQUAL_FLOPS for v in self.flops.values.values())


def judge(expectations: Sequence[Expectation], comparison: Comparison) -> list[Verdict]:
    """Every expectation at every tier of the top-k that it names; those about measured figures are one family of tests.

    `not decided`: the test does not tell the two apart. `not tested`: a method, a tier or a figure is not there.
    """
    claims = [
        (expectation, tier)
        for expectation in expectations
        for top_k in expectation.tiers
        for tier in comparison.tiers_at(top_k)
    ]
    differences = [_difference(expectation, tier, comparison) for expectation, tier in claims]
    # Counts are in no family: each member makes every other claim harder to decide.
    measured = [d for (e, _), d in zip(claims, differences, strict=True) if e.metric != "flops" and d is not None]
    tests = iter(family_tests([list(difference.values.values()) for difference in measured]))
    verdicts = []
    for (expectation, tier), difference in zip(claims, differences, strict=True):
        test = next(tests) if difference is not None and expectation.metric != "flops" else None
        flops = comparison.log_ratio(*expectation.sides, tier, "flops")
        verdicts.append(Verdict(expectation, tier, _answer(expectation, difference, test), difference, test, flops))
    return verdicts


def _difference(expectation: Expectation, tier: str, comparison: Comparison) -> Spread | None:
    here = _compared(comparison, expectation, tier)
    if here is None or expectation.more_than_at is None:
        return here
    others = comparison.tiers_at(expectation.more_than_at)
    # Of several tiers of that top-k none is the one that is meant.
    there = _compared(comparison, expectation, others[0]) if len(others) == 1 else None
    shared = sorted(set(here.values) & set(there.values)) if there is not None else []
    return Spread({seed: here.values[seed] - there.values[seed] for seed in shared}) if there is not None and shared else None


def _compared(comparison: Comparison, expectation: Expectation, tier: str) -> Spread | None:
    (left, right), metric, over = expectation.sides, expectation.metric, expectation.over
    if metric in COSTS:
        return cost_ratio(comparison, left, right, tier, metric, over)
    if over > 1:
        return late_ratio(comparison, left, right, tier, over)
    return (comparison.difference if metric in FAIRNESS else comparison.log_ratio)(left, right, tier, metric)


def _answer(expectation: Expectation, difference: Spread | None, test: PairedTest | None) -> Answer:
    """A count needs no test: it holds where it holds in every seed."""
    if difference is None:
        return "not tested"
    signs = {value < 0 for value in difference.values.values()}
    decided = len(signs) == 1 if expectation.metric == "flops" else test is not None and test.decided
    if not decided:
        return "not decided"
    return "held" if difference.mean < 0 else "did not hold"
