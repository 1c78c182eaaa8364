"""Paired: tests of differences that are paired by seed, corrected for the number of claims that are tested together.

A claim is decided where the two-sided paired t-test over seeds, corrected by Holm (1979) within its family, has p < `ALPHA`.
The t-test assumes that differences are about normal, which a few seeds cannot show. A permutation of their signs assumes less,
but with n seeds its p-value never falls below 2^(1-n) (0.25 with three), too much for a family of claims in a small study.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats  # type: ignore[import-untyped]

ALPHA = 0.05
_ROUNDING = 1e-12


@dataclass(frozen=True)
class PairedTest:
    """p-values of one claim: alone, and after the correction for its family of `family` claims."""

    p: float
    corrected: float
    family: int

    @property
    def decided(self) -> bool:
        return self.corrected < ALPHA


def t_test(differences: Sequence[float]) -> float | None:
    """Two-sided p-value of a mean of zero, n - 1 degrees of freedom; None with fewer than two differences.

    Differences that are all equal but for rounding have no spread: p is 1 where they are zero, else 0.
    """
    if len(differences) < 2:
        return None
    mean, largest = statistics.fmean(differences), max(map(abs, differences))
    if statistics.stdev(differences) <= _ROUNDING * largest:
        return 0.0 if mean else 1.0
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def half_interval(values: Sequence[float]) -> float | None:
    """Half of the width of the 95 % t-interval of a mean; None with fewer than two values."""
    if len(values) < 2:
        return None
    return float(stats.t.ppf(1.0 - ALPHA / 2, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def holm(p_values: Sequence[float]) -> list[float]:
    """Corrected p-values: the chance that any true null of the family is rejected stays below the level they are held against.

    The i-th smallest of m is multiplied by m - i + 1, and none is smaller than the one before it.
    """
    corrected, running = [1.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        running = max(running, min(1.0, (len(p_values) - place) * p_values[index]))
        corrected[index] = running
    return corrected


def family_tests(family: Sequence[Sequence[float]]) -> list[PairedTest | None]:
    """The tests of a family of claims, each with its differences by seed; a claim with a single seed is not part of it."""
    alone = [t_test(differences) for differences in family]
    known = [p for p in alone if p is not None]
    corrected = iter(holm(known))
    return [None if p is None else PairedTest(p, next(corrected), len(known)) for p in alone]


def smallest_effect(seeds: int, family: int) -> float:
    """The mean difference, in standard deviations over seeds, that decides the first claim of a family."""
    if seeds < 2:
        return math.inf
    return float(stats.t.ppf(1.0 - ALPHA / (2 * family), seeds - 1)) / math.sqrt(seeds)
