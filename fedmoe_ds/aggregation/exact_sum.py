"""Exact sums, whose result does not depend on the order of their terms, whatever the size of the weights.

Legend: head the axes that have a weight of their own ([L, E] or [L]), item the axes that share one. A row is what shares one.

A fixed grid u_k = 2^(48 k - 39), k an integer, cuts every term into digits of at most 2^47, rounding to nearest from the top:
x = sum_k d_k u_k. A row keeps two neighbouring digits of the sum, those of its window k and of k - 1, as integers, which add
exactly. A term says by itself which window it needs: the least k with |value| |weight| < 2^(48 k + 8) for all of the row.
The window of a sum is the largest that any of its terms needs; digits that fall out of it below are forgotten. As the digits of
a term do not depend on the window, what is left is the same for any grouping of clients into waves, clusters and ranks and any
order of the all-reduce (the binned sums of Demmel and Nguyen, "Parallel Reproducible Summation", 2015, with two bins). The
error is at most 2^-47 of the row's largest term for each term, be that 1e30 or 1e-200: nothing is lost where all weights are
small. Terms of the usual sizes, 2^-40 to 2^8, share window 0.

On a CPU sums run through the loops of `sums.cpp`, which pass over memory once; elsewhere through torch, with the same bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from fedmoe_ds.kernels.sums import loops_for

DIGIT_BITS = 48
ORIGIN = -39
"""The unit of the high digit of window 0 is 2^-39."""
# Windows of a float32 (2^-149 to 2^128) times a weight (2^-700 to 2^700) lie between -17 and 18, so -64 cannot be one of them.
EMPTY = -64
"""The window of a row without any term; below all others."""
MOST_TERMS = 2**16 - 1
"""Terms of one sum: digits of so many cannot overflow 64 bits."""
WEIGHT_BITS = 700
"""A weight is zero, or its magnitude lies within 2^-700 and 2^700: no product with a float32 leaves the range of float64."""


class Sum(ABC):
    """A sum of tensors of one shape, kept in one or more tensors of that shape.

    Args:
        shape: of a term.
        head: how many of its first axes have a weight of their own.
        memory: zeros to live in, COUNT times the numbers of a term; None for its own.
        windows: int64 [*head] to live in, all EMPTY; None for its own.
    """

    COUNT: ClassVar[int]
    DTYPE: ClassVar[torch.dtype]

    def __init__(
        self, shape: torch.Size | tuple[int, ...], head: int, memory: Tensor | None = None, windows: Tensor | None = None
    ) -> None:
        limbs = (self.COUNT, *shape)
        self.limbs = torch.zeros(limbs, dtype=self.DTYPE) if memory is None else memory.view(limbs)
        self.windows = torch.full(shape[:head], EMPTY) if windows is None else windows.view(shape[:head])

    @abstractmethod
    def scaled(self) -> Tensor:
        """The sum in float64, in units of its rows' windows: the value is u_window times as large."""

    @abstractmethod
    def _take(self, value: Tensor, factor: Tensor) -> None:
        """Add value times factor, float64 [*head, 1...]; both in units of the rows' windows."""

    @abstractmethod
    def _shift(self, rows: Tensor, by: Tensor) -> None:
        """Raise the windows of `rows` (bool [*head]) by so many (int64 [*head], positive there)."""

    def add_product(self, value: Tensor, factor: Tensor) -> None:
        """Add value [*head, *item], float32 or float64, times factor, float64 [*head]; a factor of zero adds zero to all.

        Raises:
            ArithmeticError: a value that is not finite has a factor that is not zero. The sum is of no use then.
        """
        loops = loops_for(value)
        if loops is not None:
            loops.fold(self.limbs, self.windows, value, factor)
            return
        # First the window, then the term: what the sum holds is cut to the new window's digits before anything is added to it.
        self.raise_to(_needed(value, factor))
        # A power of two scales exactly, so the factor may carry it: the product rounds as it would without.
        # A row that is still empty takes zeros only; 2^-unit of EMPTY lies beyond float64.
        scale = torch.where(self.windows > EMPTY, factor * power_of_two(-_unit(self.windows)), 0.0)
        scale = spread(scale, value)
        # 0 times infinity is NaN: a client without weight must add zero whatever its value has become.
        self._take(torch.where(scale == 0.0, 0.0, value.double()), scale)

    def raise_to(self, windows: Tensor) -> None:
        """Let every row's window, int64 [*head], be at least this one."""
        by = windows - self.windows
        # An empty row has no digits to move.
        rows = (by > 0) & (self.windows > EMPTY)
        if bool(rows.any()):
            self._shift(rows, by)
        # In place: the windows of all blocks lie in one tensor that the collectives reduce.
        torch.maximum(self.windows, windows, out=self.windows)

    def value(self) -> Tensor:
        """The sum in float64."""
        scaled = self.scaled()
        return scaled * spread(power_of_two(_unit(self.windows)), scaled)

    def mean(self, weight: Sum, old: Tensor) -> Tensor:
        """float32 [*head, *item]: this sum over `weight`, a sum of [*head] or [*head, *item]; `old` where that is zero."""
        # Values and weights have windows of their own; their ratio needs the distance of the two alone.
        apart = torch.where(self.windows > EMPTY, weight.windows - self.windows, 0)
        scaled = weight.scaled()
        divisor = scaled * spread(power_of_two(DIGIT_BITS * apart), scaled)
        loops = loops_for(old)
        if loops is not None:
            return loops.mean(self.limbs, divisor, old)
        divisor = spread(divisor, old)
        return torch.where(divisor > 0, (self.scaled() / torch.where(divisor > 0, divisor, 1.0)).float(), old)


class ExactSum(Sum):
    """Order-free, for up to MOST_TERMS terms."""

    COUNT, DTYPE = 2, torch.int64

    def scaled(self) -> Tensor:
        return self.limbs[0].double() + self.limbs[1].double() * 2.0**-DIGIT_BITS

    def _take(self, value: Tensor, factor: Tensor) -> None:
        scaled = value * factor
        # |scaled| < 2^47 by the choice of the window, so rounding, the difference and the cast are all exact.
        high = scaled.round()
        self.limbs[0] += high.to(torch.int64)
        # The rest is at most half a unit, so this digit too stays within 2^47. What lies below it is dropped; how much that is
        # depends on the term alone, hence the same sum in any order.
        self.limbs[1] += ((scaled - high) * 2.0**DIGIT_BITS).round_().to(torch.int64)

    def _shift(self, rows: Tensor, by: Tensor) -> None:
        high, low = self.limbs.unbind(0)
        kept = high[rows]
        # One window up, the high digit becomes the low one and the low one is forgotten; further up both are.
        low[rows] = torch.where(spread(by[rows] == 1, kept), kept, 0)
        high[rows] = 0


class FloatSum(Sum):
    """Plain float32 sums, for `fast` mode: half of the bytes, order matters in the last bits."""

    COUNT, DTYPE = 1, torch.float32

    def scaled(self) -> Tensor:
        return self.limbs[0].double()

    def _take(self, value: Tensor, factor: Tensor) -> None:
        self.limbs[0] += value * factor

    def _shift(self, rows: Tensor, by: Tensor) -> None:
        kept = self.limbs[0][rows]
        # Scaling by a power of two: exact unless the old sum is too small to count beside the new term.
        self.limbs[0][rows] = (kept * spread(power_of_two(-DIGIT_BITS * by[rows]), kept)).float()


def power_of_two(exponents: Tensor) -> Tensor:
    """2^exponents in float64, of integers: exact, and zero below 2^-1022."""
    assert exponents.dtype == torch.int64
    # Written into the exponent bits: exact on every device, which a library's pow does not promise.
    return torch.where(exponents < -1022, 0, (exponents.clamp(max=1023) + 1023) << 52).view(torch.float64)


def _needed(value: Tensor, factor: Tensor) -> Tensor:
    """int64 [*head]: the least windows that hold the products; EMPTY where all of them are zero."""
    largest = value.abs().reshape(*factor.shape, -1).amax(-1).double()
    used = factor != 0.0
    if not bool(largest[used].isfinite().all()):
        raise ArithmeticError("a weighted value is not finite")
    # frexp gives |x| < 2^e for each factor, so the product is below 2^(sum of exponents): a bound that needs no product.
    exponents = torch.frexp(largest).exponent.long() + torch.frexp(factor).exponent.long()
    return torch.where(used & (largest > 0), (exponents - ORIGIN).div(DIGIT_BITS, rounding_mode="floor"), EMPTY)


def _unit(windows: Tensor) -> Tensor:
    """The exponents of u_k."""
    return DIGIT_BITS * windows + ORIGIN


def spread(head: Tensor, full: Tensor) -> Tensor:
    """What holds for a row, shaped to be broadcast over its numbers."""
    return head.view(*head.shape, *([1] * (full.dim() - head.dim())))
