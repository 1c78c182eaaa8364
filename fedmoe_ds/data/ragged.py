"""Ragged: what many owners have, as one array and its bounds: a million owners are two arrays and no objects.

Legend: N values, P parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Ragged:
    """Part p is `values_N[bounds[p] : bounds[p + 1]]`; `bounds`, int64 [P + 1], begin with 0 and do not fall."""

    values_N: Ints
    bounds: Ints

    @classmethod
    def of(cls, values_N: Ints, sizes_P: Ints) -> Ragged:
        """Cut values into parts of these sizes, which add up to all of them."""
        bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes_P, dtype=np.int64)])
        assert bounds[-1] == len(values_N), (int(bounds[-1]), len(values_N))
        return cls(values_N, bounds)

    @classmethod
    def by_owner(cls, owner_N: Ints, owners: int) -> Ragged:
        """The places of every owner's entries in `owner_N`, ascending."""
        # Stable: that is what makes the places of one owner ascend.
        return cls.of(np.argsort(owner_N, kind="stable"), np.bincount(owner_N, minlength=owners))

    @classmethod
    def joined(cls, parts: Sequence[Ints]) -> Ragged:
        """Arrays one after the other."""
        return cls.of(np.concatenate([np.empty(0, np.int64), *parts]), np.fromiter(map(len, parts), np.int64, len(parts)))

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, part: int) -> Ints:
        return self.values_N[self.bounds[part] : self.bounds[part + 1]]

    def __iter__(self) -> Iterator[Ints]:
        return (self.values_N[start:end] for start, end in self.spans(range(len(self))))

    @property
    def sizes_P(self) -> Ints:
        return np.diff(self.bounds)

    @property
    def owner_N(self) -> Ints:
        """The part of every value."""
        return np.repeat(np.arange(len(self)), self.sizes_P)

    @property
    def place_N(self) -> Ints:
        """Where every value stands in its part, from 0."""
        return np.arange(len(self.values_N)) - np.repeat(self.bounds[:-1], self.sizes_P)

    def spans(self, parts: Iterable[int]) -> Iterator[tuple[int, int]]:
        """First place and end of some parts, as Python's integers."""
        chosen = np.fromiter(parts, np.int64)
        return zip(self.bounds[chosen].tolist(), self.bounds[chosen + 1].tolist(), strict=True)

    def totals_P(self, counts: Ints) -> Ints:
        """For every part the sum of `counts[value]` over its values."""
        # Of prefix sums, not reduceat: that gives an empty part the value behind it.
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts[self.values_N], dtype=np.int64)])
        return np.diff(ends[self.bounds])
