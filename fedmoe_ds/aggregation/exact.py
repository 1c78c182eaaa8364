"""Sums whose result does not depend on the order of their terms.

Legend: head the axes that have a weight of their own ([L, E] or [L]), item the axes that share one.

Every term is cut into two integers, x = hi * 2^-30 + lo * 2^-79 + (error below 2^-80), and integers add exactly. So any
grouping of clients into waves, clusters and ranks, and any order of the all-reduce, gives the same bits.

On a CPU sums run through the loops of `sums.cpp`, which pass over memory once; elsewhere through torch, with the same bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from fedmoe_ds.native.sums import loops_for

HIGH_BITS = 30
LOW_BITS = 79


class Sum(ABC):
    """A sum of tensors of one shape, kept in one or more tensors of that shape.

    Args:
        shape: of a term.
        memory: zeros to live in, COUNT times the numbers of a term; None for its own.
    """

    COUNT: ClassVar[int]
    DTYPE: ClassVar[torch.dtype]

    def __init__(self, shape: torch.Size | tuple[int, ...], memory: Tensor | None = None) -> None:
        limbs = (self.COUNT, *shape)
        self.limbs = torch.zeros(limbs, dtype=self.DTYPE) if memory is None else memory.view(limbs)

    @abstractmethod
    def add(self, term: Tensor) -> None:
        """Add one float64 term."""

    @abstractmethod
    def value(self) -> Tensor:
        """The sum in float64."""

    def add_product(self, value: Tensor, factor: Tensor) -> None:
        """Add value [*head, *item] times factor, float64 [*head]; what has a factor of zero adds zero, whatever it is."""
        loops = loops_for(value)
        if loops is not None:
            loops.fold(self.limbs, value, factor)
            return
        factor = _spread(factor, value)
        self.add(torch.where(factor == 0.0, 0.0, value.double() * factor))

    def mean(self, weight: Tensor, old: Tensor) -> Tensor:
        """float32 [*head, *item]: the sum over `weight`, float64 [*head]; `old` where the weight is zero."""
        loops = loops_for(old)
        if loops is not None:
            return loops.mean(self.limbs, weight, old)
        weight = _spread(weight, old)
        return torch.where(weight > 0, (self.value() / torch.where(weight > 0, weight, 1.0)).float(), old)


class ExactSum(Sum):
    """Order-free; up to 2^14 terms of magnitude below 2^19 cannot overflow."""

    COUNT, DTYPE = 2, torch.int64

    def add(self, term: Tensor) -> None:
        scaled = term * 2.0**HIGH_BITS
        high = scaled.round()
        self.limbs[0] += high.to(torch.int64)
        self.limbs[1] += ((scaled - high) * 2.0 ** (LOW_BITS - HIGH_BITS)).round_().to(torch.int64)

    def value(self) -> Tensor:
        return self.limbs[0].double() * 2.0**-HIGH_BITS + self.limbs[1].double() * 2.0**-LOW_BITS


class FloatSum(Sum):
    """Plain float32 sums, for `fast` mode: a quarter of the bytes, order matters in the last bits."""

    COUNT, DTYPE = 1, torch.float32

    def add(self, term: Tensor) -> None:
        self.limbs[0] += term

    def value(self) -> Tensor:
        return self.limbs[0].double()


def _spread(head: Tensor, full: Tensor) -> Tensor:
    return head.view(*head.shape, *([1] * (full.dim() - head.dim())))
