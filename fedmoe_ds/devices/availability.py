"""Availability: when a device is on, and virtual time itself.

Virtual time is a whole number of nanoseconds (ticks), so that adding up and comparing it is exact in any order.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

SECOND = 10**9
"""Ticks of a second."""
DAY = 86_400 * SECOND


def ticks(seconds: float) -> int:
    """Seconds as ticks, rounded up: what takes any time takes a tick."""
    return math.ceil(seconds * SECOND)


@dataclass(frozen=True)
class Availability:
    """Intervals [start, end) in which a device is on, repeated with a period; all of it in ticks.

    Attributes:
        starts, ends: of the intervals, in order, within [0, period]; neighbours do not touch, but the last may end where the
            first one begins again.
    """

    period: int
    starts: tuple[int, ...]
    ends: tuple[int, ...]

    @classmethod
    def of(cls, on: Sequence[Sequence[float]], period_s: float) -> Availability:
        """From intervals in seconds, in order; those that touch become one."""
        period = ticks(period_s)
        starts, ends = list[int](), list[int]()
        for begin, end in on:
            # Rounded outwards: no interval vanishes, however short; the last one ends with the period.
            first, last = int(begin * SECOND), min(ticks(end), period)
            if ends and first <= ends[-1]:
                ends[-1] = max(ends[-1], last)
            else:
                starts.append(first)
                ends.append(last)
        return cls(period, tuple(starts), tuple(ends))

    @property
    def always(self) -> bool:
        """Whether it is never off."""
        return self.starts == (0,) and self.ends == (self.period,)

    def until(self, time: int) -> int | None:
        """When it goes off for the first time from `time` on; None where it is off already. Not to be asked of one that is
        always on."""
        place = time % self.period
        i = bisect_right(self.starts, place) - 1
        if i < 0 or place >= self.ends[i]:
            return None
        end = self.ends[i]
        # Over midnight: the last interval goes on in the next period's first.
        if end == self.period and self.starts[0] == 0:
            end += self.ends[0]
        return time + end - place

    def next(self, time: int) -> int:
        """The first moment from `time` on in which it is on."""
        place = time % self.period
        i = bisect_right(self.starts, place) - 1
        if i >= 0 and place < self.ends[i]:
            return time
        following = self.starts[i + 1] if i + 1 < len(self.starts) else self.period + self.starts[0]
        return time + following - place


ALWAYS = Availability(DAY, (0,), (DAY,))
