"""Axis: a range of values on a chart, linear or logarithmic: the place of a value, and round values for its ticks."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

TICKS = 9
"""Most decades of a logarithmic axis that each get a tick."""
LARGEST, LEAST = sys.float_info.max, 1e-300
"""What is smaller than `LEAST` counts as zero: a span of its size would be no number any more."""


@dataclass(frozen=True)
class Axis:
    """A closed range of values on a linear or logarithmic axis."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def around(cls, values: Sequence[float], *, log: bool = False, zero: bool = False, most: float = LARGEST) -> Axis:
        """The range of finite `values` with a little air: not below zero, unless a value is, and not above `most`.

        Values that are (nearly) one get air of their own size, zeros the range from 0 to 1. `zero` starts the axis at 0.
        """
        # Nothing to draw still needs an axis; a logarithmic one cannot begin at 0.
        low, high = (min(values), max(values)) if values else (1.0, 2.0)
        return cls._logarithmic(low, high) if log else cls._linear(low, high, zero, most)

    @classmethod
    def _logarithmic(cls, low: float, high: float) -> Axis:
        bottom, top = math.log(low), math.log(high)
        little = math.log(1.02)
        # Added to logarithms, so that both ends get the same distance on the paper.
        air = max(0.06 * (top - bottom), little)
        return cls(math.exp(max(bottom - air, math.log(LEAST) - little)), math.exp(min(top + air, math.log(LARGEST))), True)

    @classmethod
    def _linear(cls, low: float, high: float, zero: bool, most: float) -> Axis:
        size = max(abs(low), abs(high))
        if size < LEAST:
            return cls(0.0, min(1.0, most))
        air = 0.06 * high - 0.06 * low  # the difference itself may be too large for a number
        if air < 6e-6 * size:
            # A flat line would otherwise lie on the frame, or the axis would show rounding errors as hills.
            air = 0.05 * size
        bottom = max(low - air, -LARGEST) if low < 0 else 0.0 if zero else max(low - air, 0.0)
        return cls(bottom, min(high + air, most))

    def place(self, value: float, start: float, end: float) -> float:
        """The coordinate of `value` when the axis runs from `start` to `end`."""
        if self.log:
            share = (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        else:
            # Halved first: high - low of two huge numbers of different sign would be infinite.
            share = (value / 2 - self.low / 2) / (self.high / 2 - self.low / 2)
        return start + share * (end - start)

    def ticks(self) -> list[float]:
        """Round values inside the range, about five; 1-2-5 per decade, or some of the decades, on a wide logarithmic axis."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
            if len(decades) > TICKS:
                stride = math.ceil(len(decades) / TICKS)
                return [10.0**e for e in decades if e % stride == 0 and self.low <= 10.0**e <= self.high]
            # The coarsest steps that give four ticks: few on a wide axis, many within a decade.
            for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
                inside = [m * 10.0**e for e in decades for m in steps if self.low <= m * 10.0**e <= self.high]
                if len(inside) >= 4:
                    return inside
        step = _nice_step(self.high / 5 - self.low / 5)
        # The tolerance keeps a tick that lies on the end of the axis up to rounding.
        first = math.ceil(self.low / step - 1e-9)
        # Multiples and not a running sum: 0.1 added ten times is not 1.
        return [index * step for index in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _nice_step(raw: float) -> float:
    power = 10.0 ** math.floor(math.log10(raw))
    # 0.999: log10 of an exact power may come out a hair too small.
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)


def whole_ticks(first: int, last: int, most: int = 8) -> list[int]:
    """At most about `most` evenly spaced whole numbers from `first` to `last`, on multiples of 1, 2, 5, 10, ..."""
    steps = (m * 10**e for e in itertools.count() for m in (1, 2, 5))
    step = next(s for s in steps if (last - first) / s <= most)
    return list(range(-(-first // step) * step, last + 1, step))
