"""Round sums: everything the clients of one round add up to, whatever the method needs of it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fedmoe_ds.aggregation.lora_factors import Collection
from fedmoe_ds.aggregation.weighted_average import Statistics
from fedmoe_ds.distributed.topology import Topology
from fedmoe_ds.model.adapter_bank import BlockSpec


class RoundSums:
    """Weighted sums of the averaged blocks; on request every participant's LoRA factors, and the changes of control or dual
    variables.

    Args:
        specs: blocks of the run.
        experts: number of experts of this rank.
        exact: order-free integer sums (bitwise) or float32 sums (fast).
        participants: clients of the round if their factors are collected, else None.
        controls: whether changes of control or dual variables are summed.
    """

    def __init__(
        self,
        specs: list[BlockSpec],
        experts: int,
        exact: bool,
        participants: int | None = None,
        controls: bool = False,
        device: torch.device | None = None,
    ) -> None:
        # Factors that are collected are not averaged as well: the mean of A and B would not be used.
        averaged = specs if participants is None else [spec for spec in specs if spec.pair is None]
        self.statistics = Statistics(averaged, experts, exact, device)
        self.collection = None if participants is None else Collection(specs, experts, participants, device)
        # Sums of their own: these changes weigh 1 / N or the share of all data, whatever the method weighs a client by.
        self.controls = Statistics(specs, experts, exact, device) if controls else None

    def add(self, place: int, spec: BlockSpec, value: Tensor, weight: np.ndarray) -> None:
        """One client's block; `place` is the client's place among the round's participants."""
        if self.collection is not None and spec.pair is not None:
            self.collection.add(place, spec.name, value, weight)
        else:
            self.statistics.add(spec.name, value, weight)

    def add_control(self, spec: BlockSpec, change: Tensor, weight: np.ndarray) -> None:
        """The change of one client's control variate."""
        assert self.controls is not None
        self.controls.add(spec.name, change, weight)

    def weighted(self) -> dict[str, int]:
        """By block: in how many of this rank's tensors the weights of the round do not sum to zero. After `reduce`."""
        found = {spec.name: int((self.statistics.weight(spec.name) > 0).sum()) for spec in self.statistics.specs}
        if self.collection is not None:
            found |= {name: int((weight_PLE > 0).any(0).sum()) for name, weight_PLE in self.collection.weights.items()}
        return found

    def reduce(self, topology: Topology) -> None:
        """Combine all clusters."""
        # The same order on all ranks: every part consists of collectives.
        for part in (self.statistics, self.collection, self.controls):
            if part is not None:
                part.reduce(topology.sum_cluster, topology.sum_shard)

    def tensors(self) -> Iterator[tuple[BlockSpec, str, int, Tensor]]:
        """(block, side, axes before the layer axis, tensor) of everything held, for checkpoints."""
        yield from self.statistics.tensors()
        if self.collection is not None:
            yield from self.collection.tensors()
        if self.controls is not None:
            yield from ((spec, f"control-{side}", lead, tensor) for spec, side, lead, tensor in self.controls.tensors())
