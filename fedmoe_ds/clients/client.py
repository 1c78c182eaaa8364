"""Client: profile and budget tier."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from fedmoe_ds.clients.tiers import Budget, tier_labels
from fedmoe_ds.config import FederationConfig, TierConfig
from fedmoe_ds.data import FederatedData
from fedmoe_ds.errors import UserError
from fedmoe_ds.randomness import generator

BudgetKind = Literal["top_k", "rank", "experts"]
"""What a method spends a budget on: active experts per token, LoRA rank, or experts trained per batch."""


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


@dataclass(frozen=True)
class Capacity:
    """The largest of what a budget can buy: the model's top-k, the adapters' rank, the experts of a layer."""

    top_k: int
    rank: int
    experts: int


@dataclass(frozen=True)
class Tier:
    """A budget tier with everything decided, see `Client`; `label` is what outputs call it."""

    top_k: int
    share: float
    cap: int
    rank: int
    experts: int
    label: str = ""

    @property
    def budget(self) -> Budget:
        return self.top_k, self.rank, self.experts


def default_tiers(top_k: int) -> list[TierConfig]:
    """K, K/2, ..., 1 with equal shares (FLAME's tiers for K = 8)."""
    caps = []
    while top_k >= 1:
        caps.append(top_k)
        top_k //= 2
    return [TierConfig(top_k=cap, share=1.0) for cap in caps]


def resolve_tiers(config: FederationConfig, full: Capacity, spends: BudgetKind) -> list[Tier]:
    """The run's tiers, checked against the model.

    Args:
        spends: what the method spends a budget on; `federation.budget` overrides it.
    Raises:
        UserError: no tier, or a number beyond the model's.
    """
    given = config.tiers if config.tiers is not None else default_tiers(full.top_k)
    if not given:
        raise UserError("federation.tiers: []: at least one tier is needed; drop the key for the default tiers")
    for i, tier in enumerate(given):
        limits = (("top_k", full.top_k, "activates", "experts per token"), ("rank", full.rank, "has", "LoRA rows"),
                  ("experts", full.experts, "has", "experts per layer"))  # fmt: skip
        for key, most, verb, unit in limits:
            value = getattr(tier, key)
            if value is not None and value > most:
                raise UserError(f"federation.tiers.{i}.{key}: {value}: the model {verb} {most} {unit}; use 1 to {most}")
    bought = spends if config.budget == "method" else config.budget
    tiers = [_decide(tier, full, bought) for tier in given]
    labels = tier_labels(tier.budget for tier in tiers)
    return [replace(tier, label=labels[tier.budget]) for tier in tiers]


def _decide(tier: TierConfig, full: Capacity, spends: str) -> Tier:
    share = tier.top_k / full.top_k
    rank = tier.rank or max(1, int(full.rank * share))
    experts = tier.experts or max(1, int(full.experts * share))
    return Tier(
        tier.top_k,
        tier.share,
        cap=tier.top_k if spends in ("top_k", "both") else full.top_k,
        rank=rank if spends in ("rank", "both") else full.rank,
        experts=experts if spends == "experts" else full.experts,
    )


def make_clients(data: FederatedData, config: FederationConfig, tiers: list[Tier], seed: int) -> list[Client]:
    """All clients of the federation, each with its tier: shares are exact up to one client, the deal is an addressed draw."""
    count = len(data.names)
    bounds = np.cumsum([tier.share for tier in tiers]) / sum(tier.share for tier in tiers)
    order = np.arange(count)
    if config.assignment == "shuffled":
        order = generator(seed, "tiers").permutation(count)
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
    return max(clients, key=lambda client: (client.budget, -client.index))
