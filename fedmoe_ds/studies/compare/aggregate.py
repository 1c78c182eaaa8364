"""Aggregate: figures over seeds: means with their spread, and comparisons of two methods that are paired by seed.

Which of two methods is better is said where a test decides it (`paired`). The family of a test is all pairs of methods at one
tier with one figure: the order of a table makes as many claims.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedmoe_ds.clients.tiers import tier_order, tier_top_k
from fedmoe_ds.studies.compare.paired import PairedTest, family_tests
from fedmoe_ds.studies.compare.record import FIGURES, Figures, Record
from fedmoe_ds.studies.spread import Spread

FOUNDATION = "foundation"
# Whether more of it is better; floating-point operations are a cost that the budget sets, so no method is best at them.
_LOWER = ("perplexity", "spread")
HIGHER_IS_BETTER = {figure: not any(word in figure for word in _LOWER) for figure in FIGURES if figure != "flops"}


@dataclass(frozen=True)
class Line:
    """A method (or the foundation) at one tier; a figure that no run recorded is absent."""

    label: str
    figures: Mapping[str, Spread]
    seeds: int


class Comparison:
    """All finished runs of a study.

    Args:
        labels: the methods in the order of --methods; one without a finished run has no lines.
        seeds: how many seeds the study asks for.
    """

    def __init__(self, labels: Sequence[str], seeds: int, records: Sequence[Record]) -> None:
        self.labels, self.seeds, self.records = list(labels), seeds, list(records)
        self.tiers = sorted({tier for record in records for tier in record.after}, key=tier_order)
        self._tests: dict[tuple[str, str], dict[tuple[str, str], PairedTest]] = {}

    def tiers_at(self, top_k: int) -> list[str]:
        """The labels of the tiers with this top-k; at least one, which is nobody's if there are none."""
        return [tier for tier in self.tiers if tier_top_k(tier) == top_k] or [str(top_k)]

    def targets(self, tier: str) -> int | None:
        """Targets of the global hold-out in all runs of a method, where every run has said how many it has."""
        first = {record.seed: record for record in reversed(self.records)}
        counts = [record.ground.get("hold-outs", {}).get(f"global k={tier}") for record in first.values()]
        return sum(counts) if counts and all(counts) else None

    def lines(self, tier: str) -> list[Line]:
        """The foundation first, then the methods; the foundation of a seed is the same in all of its runs."""
        first = {record.seed: record for record in reversed(self.records)}
        base = {seed: record.before.get(tier, {}) for seed, record in first.items()}
        # All runs of a seed evaluated the same foundation, so any of them speaks for it.
        lines = [Line(FOUNDATION, _spreads(base), len(base))]
        for label in self.labels:
            after = {record.seed: record.after.get(tier, {}) for record in self.records if record.label == label}
            if after:
                lines.append(Line(label, _spreads(after), len(after)))
        return lines

    def before_after(self, label: str, tier: str, figure: str) -> tuple[Spread, Spread] | None:
        """A method's figure in the foundation and after the last round, over the seeds that have both; None without one."""
        mine = [record for record in self.records if record.label == label]
        ends = [(r.seed, r.before.get(tier, {}).get(figure), r.after.get(tier, {}).get(figure)) for r in mine]
        known = sorted((seed, before, after) for seed, before, after in ends if before is not None and after is not None)
        if not known:
            return None
        return Spread({seed: before for seed, before, _ in known}), Spread({seed: after for seed, _, after in known})

    def complete(self, tier: str, figure: str) -> list[str]:
        """The methods that have this figure in every seed, in the order of --methods: means over other seeds say nothing."""
        found = {line.label: line.figures.get(figure) for line in self.lines(tier)[1:]}
        return [label for label, spread in found.items() if spread is not None and len(spread.values) == self.seeds]

    def tests(self, tier: str, figure: str) -> dict[tuple[str, str], PairedTest]:
        """Of all pairs of complete methods whose figures are positive and finite; empty with a single seed."""
        if (tier, figure) not in self._tests:
            pairs = itertools.combinations(self.complete(tier, figure), 2)
            ratios = {pair: ratio for pair in pairs if (ratio := self.log_ratio(*pair, tier, figure)) is not None}
            found = family_tests([list(ratio.values.values()) for ratio in ratios.values()])
            self._tests[tier, figure] = {pair: test for pair, test in zip(ratios, found, strict=True) if test is not None}
        return self._tests[tier, figure]

    def below(self, tier: str, figure: str = "perplexity") -> list[tuple[str, str]]:
        """The decided pairs, (lower, higher)."""
        decided = []
        for (left, right), test in self.tests(tier, figure).items():
            ratio = self.log_ratio(left, right, tier, figure)
            if test.decided and ratio is not None:
                decided.append((left, right) if ratio.mean < 0 else (right, left))
        return decided

    def best(self, tier: str, figure: str) -> set[str]:
        """The methods that no other is decided to be better than; empty for a cost, and where nothing is decided."""
        if figure not in HIGHER_IS_BETTER:
            return set()
        decided = self.below(tier, figure)
        beaten = {pair[0] if HIGHER_IS_BETTER[figure] else pair[1] for pair in decided}
        # With nothing decided every method would be a best one, and bold would say nothing.
        members = {label for pair in self.tests(tier, figure) for label in pair}
        return members - beaten if decided else set()

    def log_ratio(self, left: str, right: str, tier: str, figure: str) -> Spread | None:
        """log(left / right) by seed, over the seeds that both have; None without one, or where a value is not positive.

        Foundation and data differ between seeds and are shared within one, so only pairs of one seed tell methods apart.
        """
        pairs = self._pairs(left, right, tier, figure)
        # A single value without a logarithm spoils the pair: dropping its seed would favour who diverged.
        if not pairs or any(not 0 < side < math.inf for pair in pairs.values() for side in pair):
            return None
        return Spread({seed: math.log(a / b) for seed, (a, b) in pairs.items()})

    def difference(self, left: str, right: str, tier: str, figure: str) -> Spread | None:
        """left - right by seed, likewise: of shares that may be zero. None without a seed, and where one is not finite."""
        pairs = self._pairs(left, right, tier, figure)
        if not pairs or not all(math.isfinite(side) for pair in pairs.values() for side in pair):
            return None
        return Spread({seed: a - b for seed, (a, b) in pairs.items()})

    def _pairs(self, left: str, right: str, tier: str, figure: str) -> dict[int, tuple[float, float]]:
        sides = [
            {record.seed: record.after[tier][figure] for record in self.records if _holds(record, label, tier, figure)}
            for label in (left, right)
        ]
        return {seed: (sides[0][seed], sides[1][seed]) for seed in sorted(set(sides[0]) & set(sides[1]))}

    def order(self, tier: str, figure: str = "perplexity") -> list[tuple[str, str]]:
        """Complete methods, lowest first, each with the sign to its predecessor: `<` where that is decided, else `≈`.

        They are sorted by the mean of the logarithm, whose differences are what is tested.
        """
        found = {line.label: line.figures[figure].values for line in self.lines(tier)[1:] if figure in line.figures}
        heights = {
            label: sum(math.log(value) for value in found[label].values())
            for label in self.complete(tier, figure)
            if all(0 < value < math.inf for value in found[label].values())
        }
        labels, decided = sorted(heights, key=heights.__getitem__), set(self.below(tier, figure))
        signs = ["<" if pair in decided else "≈" for pair in itertools.pairwise(labels)]
        return list(zip(["", *signs], labels, strict=False))


def _holds(record: Record, label: str, tier: str, figure: str) -> bool:
    return record.label == label and figure in record.after.get(tier, {})


def _spreads(by_seed: Mapping[int, Figures]) -> dict[str, Spread]:
    """Turn figures by seed into spreads by figure."""
    found = {figure: {seed: values[figure] for seed, values in by_seed.items() if figure in values} for figure in FIGURES}
    return {figure: Spread(dict(sorted(values.items()))) for figure, values in found.items() if values}
