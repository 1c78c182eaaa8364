"""Client work: what one client's local training in one round consists of, and what it has found so far."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from fedmoe_ds.clients.assignment import Assignment
from fedmoe_ds.clients.client import Client
from fedmoe_ds.clients.lr_schedule import learning_rate
from fedmoe_ds.config import LocalConfig
from fedmoe_ds.data import Sequences
from fedmoe_ds.model.adapter_dropout import Address


@dataclass
class ClientWork:
    """One client's local training, on any rank.

    Attributes:
        slot: its home slot.
        batches: indices of the sequences of every step.
        bounds: where the passes of every step begin in it, and the end of the last one (`pass_bounds`).
        round_index, lr: of the round: its number, and its peak learning rate.
        data: on its home rank only.
        losses: mean over the targets of every step so far.
        tokens, targets: passed so far.
        observed: the method's sums over the round's batches, [L, E] each.
    """

    client: Client
    slot: int
    assignment: Assignment
    batches: list[np.ndarray]
    bounds: list[list[int]]
    round_index: int
    lr: float
    data: Sequences | None = None
    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    targets: int = 0
    observed: dict[str, Tensor] = field(default_factory=dict)

    def micro_batches(self, step: int) -> int:
        """Passes of a step."""
        return len(self.bounds[step]) - 1 if step < len(self.batches) else 0

    def chosen(self, step: int, micro: int) -> tuple[np.ndarray, Address]:
        """Its sequences in one pass of a step, and where their draws are addressed."""
        first, end = self.bounds[step][micro : micro + 2]
        return self.batches[step][first:end], (self.round_index, self.client.index, step, first)

    def rate(self, local: LocalConfig, step: int) -> float:
        """Learning rate of one of its steps."""
        return learning_rate(local, self.lr, step, len(self.batches))
