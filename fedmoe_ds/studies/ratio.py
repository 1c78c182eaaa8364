"""Ratio: a mean over another one, and the interval that their spreads leave for it.

Both are means of few repeats, so the spread of the baseline belongs to the ratio as much as that of what is compared with it.
Times and rates are positive and their errors relative, so the interval is computed for the logarithm: relative variances add
up, with Welch's and Satterthwaite's degrees of freedom (Welch 1947, https://doi.org/10.2307/2332510).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedmoe_ds.studies.spread import Spread

LEVEL = 0.95


@dataclass(frozen=True)
class Ratio:
    """A ratio of means; `low` and `high` bound it at `LEVEL`, None where a spread is not known (a single repeat)."""

    value: float
    low: float | None = None
    high: float | None = None


def ratio_of(own: Spread, base: Spread, factor: float = 1.0) -> Ratio:
    """`own` over `base`, times a factor that is known exactly. Both means must be positive."""
    value = factor * own.mean / base.mean
    if own.std is None or base.std is None or not math.isfinite(value):
        return Ratio(value)
    # Relative variances of the two means, and the repeats behind each.
    parts = [((spread.std or 0.0) ** 2 / len(spread.values) / spread.mean**2, len(spread.values)) for spread in (own, base)]
    total = sum(variance for variance, _ in parts)
    if total == 0.0:
        return Ratio(value, value, value)
    # A second to import, and only reports need it.
    from scipy.stats import t  # type: ignore[import-untyped]

    freedom = total**2 / sum(variance**2 / (count - 1) for variance, count in parts)
    reach = float(t.ppf((1 + LEVEL) / 2, freedom)) * math.sqrt(total)
    return Ratio(value, value * math.exp(-reach), value * math.exp(reach))
