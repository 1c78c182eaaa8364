"""Statistics: what a round's clients add up to.

Legend: L layers, E experts of this rank, item the shape of one adapter tensor.

A client contributes (weight x value, weight) per (layer, expert) for expert blocks and per block for dense ones. These sums
merge in any order, so waves, clusters and an interrupted round all combine by addition. The weighted mean keeps the old global
value wherever the weights sum to zero: experts that nobody trained do not move.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedmoe_ds.adapters.bank import Bank, BlockSpec
from fedmoe_ds.aggregation.exact import ExactSum, FloatSum
from fedmoe_ds.collectives import Group, all_reduce_sum

Sum = ExactSum | FloatSum


class Statistics:
    """Sums of one round on one rank.

    Args:
        specs: blocks; personal ones are ignored.
        experts: number of experts of this rank.
        exact: order-free integer sums (bitwise) or float32 sums (fast).
    """

    def __init__(self, specs: list[BlockSpec], experts: int, exact: bool, device: torch.device | None = None) -> None:
        kind: type[ExactSum] | type[FloatSum] = ExactSum if exact else FloatSum
        self.exact = exact
        self.specs = [spec for spec in specs if not spec.personal]
        self.values: dict[str, Sum] = {}
        self.weights: dict[str, Sum] = {}
        for spec in self.specs:
            head = (len(spec.layers), experts) if spec.expert else (len(spec.layers),)
            self.values[spec.name] = kind((*head, *spec.item), device)
            self.weights[spec.name] = kind(head, device)

    @torch.no_grad()
    def add(self, bank: Bank, slot: int, expert: bool, weights_LE: np.ndarray | None, weight: float) -> None:
        """Add one client's expert blocks (weights per layer and local expert) or dense blocks (one weight)."""
        for spec in self.specs:
            if spec.expert != expert:
                continue
            value = bank.client(spec.name, slot).double()
            head = value.shape[:2] if spec.expert else value.shape[:1]
            if spec.expert:
                assert weights_LE is not None
                factor = torch.from_numpy(np.ascontiguousarray(weights_LE)).to(value.device)
            else:
                factor = torch.full(head, weight, dtype=torch.float64, device=value.device)
            self.weights[spec.name].add(factor)
            self.values[spec.name].add(value * factor.view(*head, *([1] * len(spec.item))))

    def _tensors(self, expert: bool | None = None) -> list[Tensor]:
        chosen = [spec.name for spec in self.specs if expert is None or spec.expert == expert]
        return [sums[name].limbs for name in chosen for sums in (self.values, self.weights)]

    def reduce(self, ep_group: Group, ep_size: int, edp_group: Group, clusters: int) -> None:
        """Combine all clusters: dense sums meet inside the cluster, then ONE all-reduce over the expert-data-parallel group."""
        _all_reduce_flat(self._tensors(expert=False), ep_group, ep_size)
        _all_reduce_flat(self._tensors(), edp_group, clusters)

    @torch.no_grad()
    def average(self, current: Bank) -> dict[str, Tensor]:
        """The weighted mean per block, [L, E, *item] or [L, *item]; the current value where the weights sum to zero."""
        result = {}
        for spec in self.specs:
            total, weight = self.values[spec.name].value(), self.weights[spec.name].value()
            weight = weight.view(*weight.shape, *([1] * len(spec.item)))
            old = current.client(spec.name, 0).to(total.device)
            mean = (total / torch.where(weight > 0, weight, 1.0)).float()
            result[spec.name] = torch.where(weight > 0, mean, old)
        return result

    def state(self) -> dict[str, Tensor]:
        """All sums by name, for a checkpoint in the middle of a round."""
        sides = (("values", self.values), ("weights", self.weights))
        return {f"{name}/{side}": sums[name].limbs for name in self.values for side, sums in sides}


def _all_reduce_flat(tensors: list[Tensor], group: Group, size: int) -> None:
    if size == 1 or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    all_reduce_sum(flat, group, size)
    for tensor, part in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
