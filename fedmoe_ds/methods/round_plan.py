"""Round plan: what a method decides about a round before it begins, and what it may know then.

Legend: L layers, E experts of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from fedmoe_ds.clients.client import Client

Memory = Mapping[str, np.ndarray]
"""What the server knows of one client (`Method.memory`): float64 numbers by name; nothing before its first training."""


@dataclass(frozen=True)
class PlanContext:
    """What is known when a round is planned, the same on every rank.

    Attributes:
        round: from 1.
        drawn: the clients that sampling gives, in canonical order.
        clients: all clients of the federation.
        memories: what the server knows, by client index, of those that have been trained before this round.
    """

    round: int
    drawn: Sequence[Client]
    clients: Sequence[Client]
    memories: Mapping[int, Memory]


@dataclass(frozen=True)
class RoundPlan:
    """A round as a method plans it.

    Attributes:
        participants: who is trained.
        parts: by client index, whatever the method wants to tell it; it comes back as `RoundContext.plan` and
            `ClientUpdate.plan`.
    """

    participants: Sequence[Client]
    parts: Mapping[int, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RoundContext:
    """What is known when a client is told what to do.

    Attributes:
        round: from 1; 0 stands for the evaluation of the client's tier, or of its own model.
        client_state: the client's dense personal state, [L, *item] by block.
        utilisation_LE: routed rows over all clients of the last round, or None.
        plan: the client's part of the round's plan, or None.
        memory: what the server knows of it; of an evaluation, where clients keep models of their own alone.
    """

    round: int
    client_state: dict[str, Tensor]
    utilisation_LE: np.ndarray | None = None
    plan: Any = None
    memory: Memory = field(default_factory=dict)
