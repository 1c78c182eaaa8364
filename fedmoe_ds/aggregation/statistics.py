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
from fedmoe_ds.aggregation.exact import ExactSum, FloatSum, Sum
from fedmoe_ds.aggregation.flat import Flat
from fedmoe_ds.collectives import Summing


class Statistics:
    """Sums of one round on one rank; all of them lie in one piece of memory, which the collectives take as it is.

    Args:
        specs: blocks; those that nobody trains, and personal ones, are ignored.
        experts: number of experts of this rank.
        exact: order-free integer sums (bitwise) or float32 sums (fast).
    """

    def __init__(self, specs: list[BlockSpec], experts: int, exact: bool, device: torch.device | None = None) -> None:
        kind: type[Sum] = ExactSum if exact else FloatSum
        self.exact = exact
        self.specs = [spec for spec in specs if spec.trained and not spec.personal]
        heads = {spec.name: (len(spec.layers), experts) if spec.expert else (len(spec.layers),) for spec in self.specs}
        shapes = [(spec, ((*heads[spec.name], *spec.item), heads[spec.name])) for spec in self.specs]
        self.flat = Flat.zeros([(spec, tuple((kind.COUNT, *s) for s in both)) for spec, both in shapes], kind.DTYPE, device)
        self.values: dict[str, Sum] = {}
        self.weights: dict[str, Sum] = {}
        for spec, (full, head) in shapes:
            value, weight = self.flat.parts[spec.name]
            self.values[spec.name], self.weights[spec.name] = kind(full, value), kind(head, weight)

    @torch.no_grad()
    def add(self, name: str, value: Tensor, weight: np.ndarray) -> None:
        """Add one client's block.

        Args:
            value: [L, E, *item] or [L, *item], this rank's part.
            weight: float64 [L, E] or [L], the client's weight.
        """
        factor = torch.from_numpy(np.ascontiguousarray(weight, dtype=np.float64)).to(value.device)
        self.weights[name].add(factor)
        self.values[name].add_product(value, factor)

    def reduce(self, cluster: Summing, shard: Summing) -> None:
        """Combine all clusters, in place."""
        self.flat.reduce(cluster, shard)

    @torch.no_grad()
    def average(self, current: Bank) -> dict[str, Tensor]:
        """The weighted mean per block, float32 [L, E, *item] or [L, *item]; the current value where the weights sum to zero."""
        result = {}
        for spec in self.specs:
            weight = self.weight(spec.name)
            result[spec.name] = self.values[spec.name].mean(weight, current.client(spec.name, 0).to(weight.device))
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
