"""Sums whose result does not depend on the order of their terms.

Every term is cut into two integers, x = hi * 2^-30 + lo * 2^-79 + (error below 2^-80), and integers add exactly. So any
grouping of clients into waves, clusters and ranks, and any order of the all-reduce, gives the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

HIGH_BITS = 30
LOW_BITS = 79


class ExactSum:
    """An order-free sum of float64 tensors of one shape; up to 2^14 terms of magnitude below 2^19 cannot overflow."""

    def __init__(self, shape: torch.Size | tuple[int, ...], device: torch.device | None = None) -> None:
        self.limbs = torch.zeros((2, *shape), dtype=torch.int64, device=device)

    def add(self, term: Tensor) -> None:
        """Add one float64 term."""
        scaled = term * 2.0**HIGH_BITS
        high = scaled.round()
        self.limbs[0] += high.to(torch.int64)
        self.limbs[1] += ((scaled - high) * 2.0 ** (LOW_BITS - HIGH_BITS)).round_().to(torch.int64)

    def value(self) -> Tensor:
        """The sum in float64."""
        return self.limbs[0].double() * 2.0**-HIGH_BITS + self.limbs[1].double() * 2.0**-LOW_BITS


class FloatSum:
    """The same interface on plain float32 sums, for `fast` mode: a quarter of the bytes, order matters in the last bits."""

    def __init__(self, shape: torch.Size | tuple[int, ...], device: torch.device | None = None) -> None:
        self.limbs = torch.zeros((1, *shape), dtype=torch.float32, device=device)

    def add(self, term: Tensor) -> None:
        self.limbs[0] += term

    def value(self) -> Tensor:
        return self.limbs[0].double()
