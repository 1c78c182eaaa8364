"""Weighing: what a method's weights are. By default those of one mean: the sum of weight x value over the sum of weights."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Weighing:
    """How the weights of a round's clients make the next global value of a block.

    Attributes:
        changes: weights are factors on what clients changed (value - received), and the sum is not divided by theirs:
            x + factor sum_i w_i (x_i - received_i), with the method's `factor`.
        tallies: names of further numbers per client that are summed beside the changes, for `factor`.
        shares: of several weightings. The mean under each is divided by its own sum of weights; means are then mixed by these
            shares. Where nobody has weight under one of them, the others are mixed alone.
        elements: every element of a block has a weight of its own besides, the method's `element_weights`.
    """

    changes: bool = False
    tallies: tuple[str, ...] = ()
    shares: tuple[float, ...] = (1.0,)
    elements: bool = False

    def __post_init__(self) -> None:
        # A mean is divided by its own weights; a factor besides would be a second rule for the same number.
        if self.tallies and not self.changes:
            raise ValueError("tallies: are what a sum of changes is multiplied by; set changes=True")
        if self.changes + self.elements + (len(self.shares) > 1) > 1:
            raise ValueError("changes, shares, elements: are three kinds of weights; use one of them")
        if not self.shares or not all(math.isfinite(share) and share >= 0 for share in self.shares) or not sum(self.shares):
            raise ValueError(f"shares: {self.shares}: give one per weighting, none below zero and not all of them zero")

    @property
    def full(self) -> int:
        """Sums of a block under one weighting that are as large as the block."""
        return 1 + self.elements

    @property
    def heads(self) -> int:
        """Sums of a block under one weighting that have one number per (layer, expert)."""
        return 1 - self.elements + len(self.tallies)


MEAN = Weighing()
