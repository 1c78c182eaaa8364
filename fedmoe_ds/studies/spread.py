"""Spread: a figure over the seeds or repeats of a study, and how it is written: mean ± sample standard deviation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Values by seed or repeat, at least one. `std` is the sample standard deviation, None for a single value."""

    values: Mapping[int, float]

    @property
    def mean(self) -> float:
        return sum(self.values.values()) / len(self.values)

    @property
    def std(self) -> float | None:
        if len(self.values) < 2:
            return None
        # `statistics` computes with fractions, which know no infinity.
        return statistics.stdev(self.values.values()) if math.isfinite(self.mean) else math.nan


def with_spread(spread: Spread, form: Callable[[float], str]) -> str:
    """mean ± sample standard deviation; a single seed has no spread."""
    if not math.isfinite(spread.mean):
        return "not finite"
    return form(spread.mean) if spread.std is None else f"{form(spread.mean)} ± {form(spread.std)}"
