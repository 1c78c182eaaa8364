"""Weighted average: what a round's clients add up to, and the mean of it.

Legend: L layers, E experts of this rank, item the shape of one adapter tensor.

A client contributes (weight x value, weight) per (layer, expert) for expert blocks and per block for dense ones. These sums
merge in any order, so waves, clusters and an interrupted round all combine by addition, once all of them have the same windows
(`exact_sum.py`): a few bytes per (layer, expert), agreed on before the sums travel. The weighted mean keeps the old value
wherever the weights sum to zero: nobody took part there. A weight says nothing of use: where a method weighs a client by its
data alone, experts that it never used count as it holds them (weight decay has moved them).

A method may have other weights than those of a mean (`weighing.py`). Weighted changes are not divided: what they are added to
is the current value, and beside them tallies are summed, one number per client and (layer, expert), for the factor of the sum.
Weights of single elements make two sums that are as large as a block: of weight x value, and of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from fedmoe_ds.aggregation.exact_sum import EMPTY, WEIGHT_BITS, ExactSum, FloatSum, Sum, spread
from fedmoe_ds.aggregation.flat_buffer import Flat
from fedmoe_ds.aggregation.weighing import MEAN, Weighing
from fedmoe_ds.distributed.collectives import Summing
from fedmoe_ds.errors import UserError
from fedmoe_ds.model.adapter_bank import Bank, BlockSpec

Factor = Callable[[dict[str, np.ndarray]], np.ndarray | float]
"""From the tallies of a block, float64 [L, E] or [L] by name, to the factor of its sum of changes, of the same shape."""


class Statistics:
    """Sums of one round on one rank; all of them lie in one piece of memory, which the collectives take as it is.

    Args:
        specs: blocks; those that nobody trains, and personal ones, are ignored.
        experts: number of experts of this rank.
        exact: order-free integer sums (bitwise) or float32 sums (fast).
        weighing: what the weights are.
    """

    def __init__(
        self,
        specs: list[BlockSpec],
        experts: int,
        exact: bool,
        device: torch.device | None = None,
        weighing: Weighing = MEAN,
    ) -> None:
        kind: type[Sum] = ExactSum if exact else FloatSum
        self.exact, self.weighing = exact, weighing
        # The order of `specs` is the same on all ranks, and so is the layout of what travels.
        self.specs = [spec for spec in specs if spec.trained and not spec.personal]
        self.heads: dict[str, tuple[int, ...]] = {
            spec.name: (len(spec.layers), experts) if spec.expert else (len(spec.layers),) for spec in self.specs
        }
        heads = self.heads
        shapes = [(spec, _shapes(heads[spec.name], spec.item, weighing)) for spec in self.specs]
        self.flat = Flat.zeros([(spec, tuple((kind.COUNT, *s) for s in each)) for spec, each in shapes], kind.DTYPE, device)
        self.windows = self._empty_windows()
        self.values: dict[str, Sum] = {}
        self.weights: dict[str, Sum] = {}
        self.tallies: dict[str, dict[str, Sum]] = {}
        for spec, each in shapes:
            lying = zip(each, self.flat.parts[spec.name], self.windows.parts[spec.name], strict=True)
            head = len(heads[spec.name])
            self.values[spec.name], self.weights[spec.name], *tallies = (kind(s, head, part, own) for s, part, own in lying)
            self.tallies[spec.name] = dict(zip(weighing.tallies, tallies, strict=True))

    @torch.no_grad()
    def add(
        self,
        name: str,
        value: Tensor,
        weight: np.ndarray,
        tallies: Mapping[str, np.ndarray] | None = None,
        elements: Tensor | None = None,
    ) -> None:
        """Add one client's block.

        Args:
            value: [L, E, *item] or [L, *item], this rank's part; the change of it where changes are weighed.
            weight: float64 [L, E] or [L], the client's weight.
            tallies: of the same shape, by name.
            elements: float32, shaped like the value: its elements' weights, a factor on `weight`.
        Raises:
            UserError: a weight or a weighted value that no sum can hold.
        """
        factor = _factor(name, weight, value.device)
        ones = torch.ones_like(factor, dtype=torch.float32)
        assert (elements is not None) == self.weighing.elements
        if elements is not None:
            assert elements.dtype == torch.float32 and not bool((elements < 0).any()), "weights are not negative"
            # A product of two float32 is exact in float64: a client that is alone gets its own value back.
            value = value.double() * elements.double()
        try:
            self.values[name].add_product(value, factor)
            # The weights go through the same kind of sum: numerator and denominator are then both free of order.
            self.weights[name].add_product(ones if elements is None else elements, factor)
        except ArithmeticError as error:
            raise UserError(f"aggregation: {name}: {error}; lower local.lr") from None
        for tally, total in self.tallies[name].items():
            assert tallies is not None
            total.add_product(ones, _factor(name, tallies[tally], value.device))

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
            for name, windows in agreed.parts.items():
                for part, own in zip(self._sums(name), windows, strict=True):
                    part.raise_to(own[0])
        self.flat.reduce(cluster, shard)

    @torch.no_grad()
    def average(self, current: Bank, factor: Factor | None = None) -> dict[str, Tensor]:
        """By block [L, E, *item] or [L, *item]; the current value where the weights sum to zero.

        The weighted mean, float32; where changes are weighed the current value plus `factor` times their sum, float64.
        """
        result = {}
        for spec in self.specs:
            old = current.client(spec.name, 0).to(self.flat.memory.device)
            if self.weighing.changes:
                assert factor is not None
                result[spec.name] = self._changed(spec.name, old, factor)
            else:
                result[spec.name] = self.values[spec.name].mean(self.weights[spec.name], old)
        return result

    def _changed(self, name: str, old: Tensor, factor: Factor) -> Tensor:
        """In float64: rounded once, when it becomes the global value, so that a server step sees the change as it was."""
        trained = self.weight(name) > 0
        tallies = {tally: total.value().cpu().numpy() for tally, total in self.tallies[name].items()}
        # Where nobody has weight a tally may be zero, and the factor one over it.
        with np.errstate(divide="ignore", invalid="ignore"):
            times = np.array(np.broadcast_to(factor(tallies), trained.shape), dtype=np.float64)
        if not np.isfinite(times[trained.cpu().numpy()]).all():
            raise UserError(
                f"aggregation: {name}: the factor of the sum of changes is not finite; change the method's parameters"
            )
        scale = torch.where(trained, torch.from_numpy(times).to(old.device), 0.0)
        return old.double() + self.total(name) * spread(scale, old)

    def total(self, name: str) -> Tensor:
        """The weighted sum of a block, float64."""
        return self.values[name].value()

    def weight(self, name: str) -> Tensor:
        """The sum of its weights, float64 [L, E] or [L]; of elements with weights of their own, the largest."""
        total = self.weights[name].value()
        return total.flatten(len(self.heads[name])).amax(-1) if self.weighing.elements else total

    def tensors(self) -> Iterator[tuple[BlockSpec, str, int, Tensor]]:
        """(block, side, axes before the layer axis, tensor) of every sum, for a checkpoint in the middle of a round."""
        for spec in self.specs:
            own = [f"tally-{tally}" for tally in self.weighing.tallies]
            for side, part in zip(["values", "weights", *own], self._sums(spec.name), strict=True):
                yield spec, side, 1, part.limbs
            names = ["value-windows", "weight-windows", *[f"{tally}-windows" for tally in own]]
            for side, windows in zip(names, self.windows.parts[spec.name], strict=True):
                yield spec, side, 1, windows

    def _sums(self, name: str) -> list[Sum]:
        """Those of a block, in the order in which they lie."""
        return [self.values[name], self.weights[name], *self.tallies[name].values()]

    def _empty_windows(self) -> Flat:
        """By block, the windows of its values, of its weights and of its tallies, [1, *head] each."""
        count = 2 + len(self.weighing.tallies)
        shapes = [(spec, ((1, *self.heads[spec.name]),) * count) for spec in self.specs]
        windows = Flat.zeros(shapes, torch.int64, self.flat.memory.device)
        windows.memory.fill_(EMPTY)
        return windows


def _shapes(head: tuple[int, ...], item: tuple[int, ...], weighing: Weighing) -> tuple[tuple[int, ...], ...]:
    """Those of a block's sums: of its values, of its weights, and of its tallies."""
    return (*head, *item), ((*head, *item) if weighing.elements else head), *[head] * len(weighing.tallies)


def _factor(name: str, weight: np.ndarray, device: torch.device) -> Tensor:
    """float64, on the device of the values. Raises UserError for what no sum can hold."""
    # `~(a <= w <= b)` and not `w < a or w > b`: NaN fails both comparisons and is caught by the first form alone.
    beyond = weight[(weight != 0) & ~((weight >= 2.0**-WEIGHT_BITS) & (weight <= 2.0**WEIGHT_BITS))]
    if beyond.size:
        raise UserError(
            f"aggregation: {name}: a client weighs {beyond[0]:g}; sums hold 0 and 2^-{WEIGHT_BITS} to 2^{WEIGHT_BITS}; "
            "change the method's parameters"
        )
    return torch.from_numpy(np.ascontiguousarray(weight, dtype=np.float64)).to(device)
