"""Round plan: what a method decides about a round before it begins, and what it may know then.

Legend: L layers, E experts of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedmoe_ds.aggregation.averaged_statistics import Statistic
from fedmoe_ds.clients.client import Client

Memory = Mapping[str, np.ndarray]
"""What the server knows of one client (`Method.memory`): float64 numbers by name; nothing before its first training."""


@dataclass(frozen=True)
class Load:
    """What one round of the local work that the configuration names is to a client: steps, predicted FLOPs, bytes to send."""

    steps: int
    flops: float
    up_bytes: int


@dataclass(frozen=True)
class Spending:
    """What a client spends in a round: seconds of computing and of sending, one after the other, and joules of both."""

    compute_s: float
    up_s: float
    joules: float


def _unknown(*_: Any) -> Any:
    raise NotImplementedError("whoever makes this context tells it")


@dataclass(frozen=True)
class PlanContext:
    """What is known when a round is planned, the same on every rank.

    Attributes:
        round: from 1.
        drawn: the clients that sampling gives, in canonical order; of simulated devices those that are asked, of whom some may
            be lost or late.
        clients: all clients of the federation.
        memories: what the server knows, by client index, of those that have been trained before this round.
        load: of one of the drawn clients.
        labels: units of each label that every client was dealt, int64 [clients, labels]; none where the data have no labels.
    """

    round: int
    drawn: Sequence[Client]
    clients: Sequence[Client]
    memories: Mapping[int, Memory]
    load: Callable[[Client], Load] = _unknown
    labels: Callable[[], NDArray[np.int64]] = _unknown


@dataclass(frozen=True)
class RoundPlan:
    """A round as a method plans it.

    Attributes:
        participants: who is trained.
        parts: by client index, whatever the method wants to tell it; it comes back as `RoundContext.plan` and
            `ClientUpdate.plan`.
        spending: by client index, where the method `accounts` for time and energy.
        load_variation: coefficient of variation, over the experts of a layer, of how many participants hold each of them; the
            mean over layers. For the record, where the method deals experts.
    """

    participants: Sequence[Client]
    parts: Mapping[int, Any] = field(default_factory=dict)
    spending: Mapping[int, Spending] = field(default_factory=dict)
    load_variation: float | None = None


@dataclass(frozen=True)
class RoundContext:
    """What is known when a client is told what to do.

    Attributes:
        round: from 1; 0 stands for the evaluation of the client's tier, or of its own model.
        client_state: the client's dense personal state, [L, *item] by block.
        utilisation_LE: routed rows over all clients of the last round, or None; always None where clients are private.
        plan: the client's part of the round's plan, or None.
        memory: what the server knows of it; of an evaluation, where clients keep models of their own alone.
        statistics: those of the method, as the last round has left them; none in an evaluation.
    """

    round: int
    client_state: dict[str, Tensor]
    utilisation_LE: np.ndarray | None = None
    plan: Any = None
    memory: Memory = field(default_factory=dict)
    statistics: Mapping[str, Statistic] = field(default_factory=dict)


@dataclass(frozen=True)
class MeanContext:
    """What is known when a round's mean reaches the server.

    Attributes:
        round: from 1.
        memories: what `Method.memorise` wrote in this round, by client index: of everybody who is in the mean.
        counts_LE: routed rows over all clients of the round.
        tokens: token rows over all of them.
    """

    round: int
    memories: Mapping[int, Memory]
    counts_LE: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), dtype=np.int64))
    tokens: int = 0


TensorRule = Callable[[str, Tensor], Tensor]
"""(canonical name of an adapter tensor, the mean of it) -> what the server receives in its place, of the same shape."""
