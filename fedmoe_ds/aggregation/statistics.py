"""Statistics: what a round's clients add up to.

Legend: L layers, E experts of this rank, item the shape of one adapter tensor.

A client contributes (weight x value, weight) per (layer, expert) for expert blocks and per block for dense ones. These sums
merge in any order, so waves, clusters and an interrupted round all combine by addition. The weighted mean keeps the old global
value wherever the weights sum to zero: experts that nobody trained do not move.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fedmoe_ds.adapters.bank import Bank, BlockSpec
from fedmoe_ds.aggregation.exact import ExactSum, FloatSum
from fedmoe_ds.collectives import Summing

Sum = ExactSum | FloatSum


class Statistics:
    """Sums of one round on one rank.

    Args:
        specs: blocks; those that nobody trains, and personal ones, are ignored.
        experts: number of experts of this rank.
        exact: order-free integer sums (bitwise) or float32 sums (fast).
    """

    def __init__(self, specs: list[BlockSpec], experts: int, exact: bool, device: torch.device | None = None) -> None:
        kind: type[ExactSum] | type[FloatSum] = ExactSum if exact else FloatSum
        self.exact = exact
        self.specs = [spec for spec in specs if spec.trained and not spec.personal]
        self.values: dict[str, Sum] = {}
        self.weights: dict[str, Sum] = {}
        for spec in self.specs:
            head = (len(spec.layers), experts) if spec.expert else (len(spec.layers),)
            self.values[spec.name] = kind((*head, *spec.item), device)
            self.weights[spec.name] = kind(head, device)

    @torch.no_grad()
    def add(self, name: str, value: Tensor, weight: np.ndarray) -> None:
        """Add one client's block.

        Args:
            value: [L, E, *item] or [L, *item], this rank's part.
            weight: float64 [L, E] or [L], the client's weight.
        """
        factor = torch.from_numpy(np.ascontiguousarray(weight, dtype=np.float64)).to(value.device)
        self.weights[name].add(factor)
        self.values[name].add(value.double() * factor.view(*factor.shape, *([1] * (value.dim() - factor.dim()))))

    def _tensors(self, expert: bool | None = None) -> list[Tensor]:
        chosen = [spec.name for spec in self.specs if expert is None or spec.expert == expert]
        return [sums[name].limbs for name in chosen for sums in (self.values, self.weights)]

    def reduce(self, cluster: Summing, shard: Summing) -> None:
        """Combine all clusters: dense sums meet inside the cluster, then ONE sum over the ranks with the same expert shard."""
        _sum_flat(self._tensors(expert=False), cluster)
        _sum_flat(self._tensors(), shard)

    @torch.no_grad()
    def average(self, current: Bank) -> dict[str, Tensor]:
        """The weighted mean per block, [L, E, *item] or [L, *item]; the current value where the weights sum to zero."""
        result = {}
        for spec in self.specs:
            total, weight = self.total(spec.name), self.weight(spec.name)
            weight = weight.view(*weight.shape, *([1] * len(spec.item)))
            old = current.client(spec.name, 0).to(total.device)
            mean = (total / torch.where(weight > 0, weight, 1.0)).float()
            result[spec.name] = torch.where(weight > 0, mean, old)
        return result

    def total(self, name: str) -> Tensor:
        """The weighted sum of a block, float64."""
        return self.values[name].value()

    def weight(self, name: str) -> Tensor:
        """The sum of its weights, float64 [L, E] or [L]."""
        return self.weights[name].value()

    def tensors(self) -> Iterator[tuple[BlockSpec, str, int, Tensor]]:
        """(block, side, axes before the layer axis, tensor) of every sum, for a checkpoint in the middle of a round."""
        for spec in self.specs:
            for side, sums in (("values", self.values), ("weights", self.weights)):
                yield spec, side, 1, sums[spec.name].limbs


def _sum_flat(tensors: list[Tensor], group: Summing) -> None:
    if group.size == 1 or not tensors:
        return
    flat = group.sum(torch.cat([tensor.flatten() for tensor in tensors]))
    for tensor, part in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
