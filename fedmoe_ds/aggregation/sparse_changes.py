"""Sparse changes: what the server receives of a client that sends only what it changed most (top-k sparsification).

Of every tensor (of one layer, and expert) the ceil(density n) of its n numbers whose change has the largest magnitude arrive,
of equal ones those that come first; the others count as the client received them. No other vector with so few entries is
nearer to the change. A tensor lies whole on one rank, so nobody needs to know of another's.

Legend: N numbers of one tensor.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

INDEX_BYTES = 4
"""Of the place of a number that is sent, beside its value."""


def kept_of(density: float | Fraction, numbers: int) -> int:
    """How many of a tensor's numbers are sent."""
    # The decimal number that the user wrote: as a float, 0.1 of 10 would be a little more than 1.
    return math.ceil(Fraction(str(density)) * numbers)


def largest_changes(value: Tensor, received: Tensor, axes: int, density: float | Fraction) -> Tensor:
    """`value` where the change since `received` is among the largest of its tensor, and `received` elsewhere.

    Args:
        axes: how many of the last axes are one tensor; those before them count tensors.
    """
    # In float64: two float32 numbers may be so near that their difference rounds to another order.
    change = (value.double() - received.double()).abs().flatten(-axes)
    kept = kept_of(density, change.shape[-1])
    # Stable: which of equal ones is first would else be the library's choice.
    order_N = change.argsort(dim=-1, descending=True, stable=True)
    sent = torch.zeros_like(change, dtype=torch.bool).scatter_(-1, order_N[..., :kept], True)
    # Their values and not the sum of start and change: a client that sends all sends its own bits.
    return torch.where(sent.view(value.shape), value, received)
