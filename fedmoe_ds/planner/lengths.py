"""Lengths: how long the samples of clients are, counted or assumed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fedmoe_ds.data import ImageInput, Sequences

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Lengths:
    """Token rows and targets of every sample of an owner, int64 [n]."""

    rows: Counts
    targets: Counts

    @classmethod
    def of(cls, data: Sequences, images: ImageInput | None) -> Lengths:
        if images is not None:
            return cls(np.full(len(data), images.positions), np.ones(len(data), dtype=np.int64))
        rows = np.array([len(ids) for ids in data.input_ids], dtype=np.int64)
        return cls(rows, np.array([int(mask.sum()) for mask in data.loss_mask], dtype=np.int64))

    @classmethod
    def full(cls, count: int, length: int) -> Lengths:
        return cls(np.full(count, length), np.full(count, length - 1))

    @cached_property
    def alike(self) -> bool:
        """Whether all samples are equally long, with as many targets."""
        return len(self.rows) > 0 and bool((self.rows == self.rows[0]).all() and (self.targets == self.targets[0]).all())

    def head(self, count: int | None) -> Lengths:
        return Lengths(self.rows[:count], self.targets[:count])


@dataclass(frozen=True)
class Data:
    """Who has how much. `assumed` says what was taken for granted where nothing could be counted, `omissions` what samples
    are left out or cut, `reading` how rows were read where that is a choice; each is one line or None. `candidates` is how
    many answers a sample is ranked against."""

    train: Callable[[int], Lengths]
    holdout: Callable[[int], Lengths]
    global_holdout: Lengths
    assumed: str | None = None
    omissions: str | None = None
    reading: str | None = None
    candidates: int = 0
