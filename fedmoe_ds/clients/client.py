"""Client: its data sizes and its budget, and how a federation's clients get their tiers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fedmoe_ds.clients.tiers import Budget, Tier
from fedmoe_ds.config import FederationConfig
from fedmoe_ds.data import FederatedData
from fedmoe_ds.randomness import generator


@dataclass(frozen=True)
class Client:
    """One federated client: its data sizes, its budget tier and what the budget buys.

    Attributes:
        targets: what one epoch predicts: next tokens, or classes of images.
        top_k: a FLOPs budget named by the number of active experts that it pays for.
        cap: active experts per token that the client really uses.
        rank: LoRA rank that it trains.
        experts: experts per layer that one of its batches may train.
        steps: exact local steps, where they are not derived from the sequences (the pooled client of centralised training).
        tier: what outputs call its tier, see `fedmoe_ds.clients.tiers`; clients of one tier have one budget.
    """

    index: int
    name: str
    top_k: int
    samples: int
    sequences: int
    targets: int
    cap: int = 1
    rank: int = 1
    experts: int = 1
    steps: int | None = None
    tier: str = ""

    @property
    def budget(self) -> Budget:
        return self.top_k, self.rank, self.experts


def make_clients(data: FederatedData, config: FederationConfig, tiers: list[Tier], seed: int) -> list[Client]:
    """All clients of the federation, each with its tier: shares are exact up to one client, the deal is an addressed draw."""
    count = len(data.names)
    bounds = np.cumsum([tier.share for tier in tiers]) / sum(tier.share for tier in tiers)
    order = np.arange(count)
    if config.assignment == "shuffled":
        order = generator(seed, "tiers").permutation(count)
    # Every client stands at the middle of its 1 / count; the minimum catches a last bound that rounding leaves below 1.
    tier_of = np.minimum(np.searchsorted(bounds, (np.arange(count) + 0.5) / count), len(tiers) - 1)
    dealt = dict(zip(order.tolist(), (tiers[t] for t in tier_of), strict=True))
    return [
        Client(
            i,
            name,
            dealt[i].top_k,
            int(data.samples[i]),
            int(data.train_sequences[i]),
            int(data.train_tokens[i]),
            dealt[i].cap,
            dealt[i].rank,
            dealt[i].experts,
            tier=dealt[i].label,
        )
        for i, name in enumerate(data.names)
    ]


def tiers_of(clients: Iterable[Client]) -> dict[str, list[Client]]:
    """The clients of every tier, by its label, the largest budget first."""
    found: dict[str, list[Client]] = {}
    for client in sorted(clients, key=lambda client: client.budget, reverse=True):
        found.setdefault(client.tier, []).append(client)
    return found


def richest(clients: Iterable[Client]) -> Client:
    """The client with the largest budget, the first of them."""
    # -index: among equal budgets the first client, whatever order they come in.
    return max(clients, key=lambda client: (client.budget, -client.index))
