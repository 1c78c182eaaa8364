"""Fingerprint: an expert's change, projected to a few numbers that keep distances.

    p_j = sum over the elements i of bucket j of s_i x_i,        s_i = +-1 drawn, buckets drawn and of equal size

Of all elements of an expert's tensors the squared distance of two projections is that of the changes in expectation, and off by
a factor of about sqrt(2 / J) of J numbers. Signs are drawn by tensor, layer and expert, so all clients project alike and no two
layers do.

Legend: L layers, E experts that a rank holds, J numbers.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fedmoe_ds.clients.client_view import ClientView
from fedmoe_ds.model.adapter_bank import BlockSpec
from fedmoe_ds.randomness import generator


class Projection:
    """The seeded projection of a run to `numbers`."""

    def __init__(self, seed: int, numbers: int) -> None:
        self.seed, self.numbers = seed, numbers
        self._orders: dict[str, Tensor] = {}

    def changes(self, view: ClientView) -> Tensor:
        """What the client has changed of every expert on this rank, over all of its tensors: float64 [L, E, J]."""
        found = torch.zeros(0)
        for spec in (spec for spec in view.blocks() if spec.expert):
            change = view.value(spec).double() - view.received(spec).double()
            rows = [
                [self._project(spec, layer, view.first_expert + expert, item) for expert, item in enumerate(own)]
                for layer, own in zip(spec.layers, change, strict=True)
            ]
            projected_LEJ = torch.stack([torch.stack(own) for own in rows])
            found = found + projected_LEJ if len(found) else projected_LEJ
        return found

    def _project(self, spec: BlockSpec, layer: int, expert: int, item: Tensor) -> Tensor:
        """One tensor: [J]. By itself, so that no sum follows from how many experts a rank holds."""
        draw = generator(self.seed, "fingerprint signs", spec.name, layer, expert)
        negative = np.unpackbits(draw.integers(0, 256, -(-item.numel() // 8), dtype=np.uint8))[: item.numel()]
        signs = torch.from_numpy(1.0 - 2.0 * negative).to(item.device)
        order = self._order(spec).to(item.device)
        # Zeros fill up the last bucket.
        filled = torch.zeros(self.numbers * math.ceil(item.numel() / self.numbers), dtype=torch.float64, device=item.device)
        filled[: item.numel()] = (item.flatten() * signs)[order]
        return filled.view(-1, self.numbers).sum(0)

    def _order(self, spec: BlockSpec) -> Tensor:
        if spec.name not in self._orders:
            count = math.prod(spec.item)
            order = generator(self.seed, "fingerprint buckets", spec.name).permutation(count)
            self._orders[spec.name] = torch.from_numpy(order)
        return self._orders[spec.name]
