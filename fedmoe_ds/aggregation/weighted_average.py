"""Weighted average: what a round's clients add up to, and the mean of it.

Legend: L layers, E experts of this rank, item the shape of one adapter tensor.

A client contributes (weight x value, weight) per (layer, expert) for expert blocks and per block for dense ones. These sums
merge in any order, so waves, clusters and an interrupted round all combine by addition, once all of them have the same windows
(`exact_sum.py`): a few bytes per (layer, expert), agreed on before the sums travel. The weighted mean keeps the old value
wherever the weights sum to zero: nobody took part there. A weight says nothing of use: where a method weighs a client by its
data alone, experts that it never used count as it holds them (weight decay has moved them).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fedmoe_ds.aggregation.exact_sum import EMPTY, WEIGHT_BITS, ExactSum, FloatSum, Sum
from fedmoe_ds.aggregation.flat_buffer import Flat
from fedmoe_ds.distributed.collectives import Summing
from fedmoe_ds.errors import UserError
from fedmoe_ds.model.adapter_bank import Bank, BlockSpec


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
        # The order of `specs` is the same on all ranks, and so is the layout of what travels.
        self.specs = [spec for spec in specs if spec.trained and not spec.personal]
        self.heads: dict[str, tuple[int, ...]] = {
            spec.name: (len(spec.layers), experts) if spec.expert else (len(spec.layers),) for spec in self.specs
        }
        heads = self.heads
        shapes = [(spec, ((*heads[spec.name], *spec.item), heads[spec.name])) for spec in self.specs]
        self.flat = Flat.zeros([(spec, tuple((kind.COUNT, *s) for s in both)) for spec, both in shapes], kind.DTYPE, device)
        self.windows = self._empty_windows()
        self.values: dict[str, Sum] = {}
        self.weights: dict[str, Sum] = {}
        for spec, (full, head) in shapes:
            value, weight = self.flat.parts[spec.name]
            of_value, of_weight = self.windows.parts[spec.name]
            self.values[spec.name] = kind(full, len(head), value, of_value)
            self.weights[spec.name] = kind(head, len(head), weight, of_weight)

    @torch.no_grad()
    def add(self, name: str, value: Tensor, weight: np.ndarray) -> None:
        """Add one client's block.

        Args:
            value: [L, E, *item] or [L, *item], this rank's part.
            weight: float64 [L, E] or [L], the client's weight.
        Raises:
            UserError: a weight or a weighted value that no sum can hold.
        """
        # `~(a <= w <= b)` and not `w < a or w > b`: NaN fails both comparisons and is caught by the first form alone.
        beyond = weight[(weight != 0) & ~((weight >= 2.0**-WEIGHT_BITS) & (weight <= 2.0**WEIGHT_BITS))]
        if beyond.size:
            raise UserError(
                f"aggregation: {name}: a client weighs {beyond[0]:g}; sums hold 0 and 2^-{WEIGHT_BITS} to 2^{WEIGHT_BITS}; "
                "change the method's parameters"
            )
        factor = torch.from_numpy(np.ascontiguousarray(weight, dtype=np.float64)).to(value.device)
        try:
            self.values[name].add_product(value, factor)
        except ArithmeticError as error:
            raise UserError(f"aggregation: {name}: {error}; lower local.lr") from None
        # The weights go through the same kind of sum: numerator and denominator are then both free of order.
        self.weights[name].add_product(torch.ones_like(factor, dtype=torch.float32), factor)

    def reduce(self, cluster: Summing, shard: Summing) -> None:
        """Combine all clusters, in place: the windows first, then everything in one sum."""
        if cluster.size == shard.size == 1:
            return
        # Digits of different windows must not be added. A copy travels: the own windows say by how much a sum is to move.
        agreed = self._empty_windows()
        agreed.memory.copy_(self.windows.memory)
        agreed.largest(cluster, shard)
        # A local decision: nothing below it but the last line is a collective, so ranks may differ here.
        if not torch.equal(agreed.memory, self.windows.memory):
            for name, (of_value, of_weight) in agreed.parts.items():
                self.values[name].raise_to(of_value[0])
                self.weights[name].raise_to(of_weight[0])
        self.flat.reduce(cluster, shard)

    @torch.no_grad()
    def average(self, current: Bank) -> dict[str, Tensor]:
        """The weighted mean per block, float32 [L, E, *item] or [L, *item]; the current value where the weights sum to zero."""
        result = {}
        for spec in self.specs:
            old = current.client(spec.name, 0).to(self.flat.memory.device)
            result[spec.name] = self.values[spec.name].mean(self.weights[spec.name], old)
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
            for side, windows in zip(("value-windows", "weight-windows"), self.windows.parts[spec.name], strict=True):
                yield spec, side, 1, windows

    def _empty_windows(self) -> Flat:
        """By block, the windows of its values and of its weights, [1, *head] each."""
        shapes = [(spec, ((1, *self.heads[spec.name]),) * 2) for spec in self.specs]
        windows = Flat.zeros(shapes, torch.int64, self.flat.memory.device)
        windows.memory.fill_(EMPTY)
        return windows
