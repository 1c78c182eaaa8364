"""Client block: one block of the adapters of all clients on a device, with what one optimizer step of theirs needs.

Legend: L layers, E experts held by this rank, C clients.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

FACTORS = ACTIVE, CLIP, RATE, KEEP, ROOT, BLEND1, BLEND2 = tuple(range(7))
"""Rows of a table of factors, a column per client: 1 where the client takes a step, else 0; what its gradient is multiplied
by; its rate (of AdamW lr / (1 - beta1^t)); what weight decay leaves of a value, 1 - lr * decay; sqrt(1 - beta2^t); and how much
of the new enters each moment, 1 - beta1 and 1 - beta2. Without a step, rate and blends are 0 and the others 1."""


@dataclass(frozen=True)
class ClientBlock:
    """A step changes values and moments in place and clears gradients.

    Attributes:
        value, grad: float32 [L, E, C, *item], or [L, C, *item] without experts; dense.
        moments: none, one or two of the same shape; float32, or bfloat16 where there are `bases_C`.
        item_axes: axes of one client's parameter in one layer (of one expert).
        factors_7C: float32, rows as named above; a view of a wider table.
        bases_C: int64, what a client's random rounding starts from in this block (`Rounding.base`).
        first_expert: global id of the first of the E experts.
        decay: weight decay; 0 where none applies.
    """

    value: Tensor
    grad: Tensor
    moments: list[Tensor]
    item_axes: int
    factors_7C: Tensor
    bases_C: Tensor | None
    first_expert: int
    decay: float

    @property
    def experts(self) -> int:
        """E, or 1 without experts."""
        return self.value.shape[1] if self.value.dim() - self.item_axes == 3 else 1

    def layer(self, row: int, moments: list[Tensor], bases_C: Tensor | None = None) -> ClientBlock:
        """One layer of it, with other tensors for its moments: float32 ones without `bases_C`."""
        one = slice(row, row + 1)
        return replace(self, value=self.value[one], grad=self.grad[one], moments=moments, bases_C=bases_C)
