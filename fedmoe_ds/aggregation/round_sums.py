"""Round sums: everything the clients of one round add up to, whatever the method needs of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedmoe_ds.aggregation.averaged_statistics import AveragedStatistics
from fedmoe_ds.aggregation.exact_sum import spread
from fedmoe_ds.aggregation.lora_factors import Collection
from fedmoe_ds.aggregation.weighing import MEAN, Weighing
from fedmoe_ds.aggregation.weighted_average import Factor, Statistics
from fedmoe_ds.distributed.topology import Topology
from fedmoe_ds.model.adapter_bank import Bank, BlockSpec


class RoundSums:
    """Weighted sums of the averaged blocks; on request every participant's LoRA factors, the changes of control or dual
    variables, and statistics.

    Args:
        specs: blocks of the run.
        experts: number of experts of this rank.
        exact: order-free integer sums (bitwise) or float32 sums (fast).
        participants: clients of the round if their factors are collected, else None.
        controls: whether changes of control or dual variables are summed.
        weighing: what the weights of the method are.
        keyed: statistics that are summed with weights of their own; None: there are none.
    """

    def __init__(
        self,
        specs: list[BlockSpec],
        experts: int,
        exact: bool,
        participants: int | None = None,
        controls: bool = False,
        device: torch.device | None = None,
        weighing: Weighing = MEAN,
        keyed: AveragedStatistics | None = None,
    ) -> None:
        # Factors that are collected are not averaged as well: the mean of A and B would not be used.
        averaged = specs if participants is None else [spec for spec in specs if spec.pair is None]
        self.weighing = weighing
        # One per weighting, with values of its own: x_i is multiplied by another weight in each.
        self.weightings = [Statistics(averaged, experts, exact, device, weighing) for _ in weighing.shares]
        self.statistics = self.weightings[0]
        self.collection = None if participants is None else Collection(specs, experts, participants, device)
        # Sums of their own: these changes weigh 1 / N or the share of all data, whatever the method weighs a client by.
        self.controls = Statistics(specs, experts, exact, device) if controls else None
        self.keyed = None if keyed is None else keyed.sums(exact, device)

    def add(
        self,
        place: int,
        spec: BlockSpec,
        value: Tensor,
        weights: Sequence[np.ndarray],
        tallies: Mapping[str, np.ndarray] | None = None,
        elements: Tensor | None = None,
    ) -> None:
        """One client's block and its weight under every weighting; `place` is its place among the round's participants."""
        if self.collection is not None and spec.pair is not None:
            self.collection.add(place, spec.name, value, weights[0])
            return
        for sums, weight in zip(self.weightings, weights, strict=True):
            sums.add(spec.name, value, weight, tallies, elements)

    def add_control(self, spec: BlockSpec, change: Tensor, weight: np.ndarray) -> None:
        """The change of one client's control variate."""
        assert self.controls is not None
        self.controls.add(spec.name, change, weight)

    def average(self, current: Bank, factor: Factor) -> dict[str, Tensor]:
        """What the method's weights make of the current value of each averaged block, before the server's step."""
        means = [sums.average(current, factor) for sums in self.weightings]
        if len(means) == 1:
            return means[0]
        return {spec.name: self._mixed(spec.name, [mean[spec.name] for mean in means]) for spec in self.statistics.specs}

    def _mixed(self, name: str, means: list[Tensor]) -> Tensor:
        """By shares, in float64; a weighting without weight gives its share up, and has the current value as its mean."""
        parts = [
            torch.where(sums.weight(name) > 0, share, 0.0).double()
            for sums, share in zip(self.weightings, self.weighing.shares, strict=True)
        ]
        whole = torch.stack(parts).sum(0)
        mixed = sum((spread(part, mean) * mean.double() for part, mean in zip(parts, means, strict=True)), torch.zeros(()))
        # Where all shares are gone, every mean is the current value.
        some = spread(whole > 0, means[0])
        return torch.where(some, mixed / torch.where(some, spread(whole, means[0]), 1.0), means[0].double()).float()

    def trained(self, name: str) -> Tensor:
        """Where anybody had weight that counts: bool [L, E] or [L]."""
        counting = [sums for sums, share in zip(self.weightings, self.weighing.shares, strict=True) if share > 0]
        return torch.stack([sums.weight(name) > 0 for sums in counting]).any(0)

    def weighted(self) -> dict[str, int]:
        """By block: in how many of this rank's tensors the weights of the round do not sum to zero. After `reduce`."""
        found = {spec.name: int(self.trained(spec.name).sum()) for spec in self.statistics.specs}
        if self.collection is not None:
            found |= {name: int((weight_PLE > 0).any(0).sum()) for name, weight_PLE in self.collection.weights.items()}
        return found

    def reduce(self, topology: Topology) -> None:
        """Combine all clusters."""
        # The same order on all ranks: every part consists of collectives.
        for part in (*self.weightings, self.collection, self.controls, self.keyed):
            if part is not None:
                part.reduce(topology.sum_cluster, topology.sum_shard)

    def tensors(self) -> Iterator[tuple[BlockSpec, str, int, Tensor]]:
        """(block, side, axes before the layer axis, tensor) of everything held, for checkpoints."""
        yield from self.statistics.tensors()
        for number, sums in enumerate(self.weightings[1:], 2):
            yield from ((spec, f"weighting-{number}-{side}", lead, tensor) for spec, side, lead, tensor in sums.tensors())
        if self.collection is not None:
            yield from self.collection.tensors()
        if self.controls is not None:
            yield from ((spec, f"control-{side}", lead, tensor) for spec, side, lead, tensor in self.controls.tensors())
        if self.keyed is not None:
            yield from self.keyed.tensors()
