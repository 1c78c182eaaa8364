"""Client: profile and budget tier."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedmoe_ds.config import FederationConfig, TierConfig
from fedmoe_ds.data import FederatedData
from fedmoe_ds.errors import UserError
from fedmoe_ds.randomness import generator


@dataclass(frozen=True)
class Client:
    """One federated client: its data sizes and the cap on its active experts."""

    index: int
    name: str
    top_k: int
    samples: int
    sequences: int
    tokens: int


def default_tiers(top_k: int) -> list[TierConfig]:
    """K, K/2, ..., 1 with equal shares (FLAME's tiers for K = 8)."""
    caps = []
    while top_k >= 1:
        caps.append(top_k)
        top_k //= 2
    return [TierConfig(top_k=cap, share=1.0) for cap in caps]


def resolve_tiers(config: FederationConfig, model_top_k: int) -> list[TierConfig]:
    """The run's tiers, checked against the model. Raises UserError for a cap above the model's top-k."""
    tiers = config.tiers if config.tiers is not None else default_tiers(model_top_k)
    if not tiers:
        raise UserError("federation.tiers: []: at least one tier is needed; drop the key for the default tiers")
    for i, tier in enumerate(tiers):
        if tier.top_k > model_top_k:
            raise UserError(
                f"federation.tiers.{i}.top_k: {tier.top_k}: the model activates {model_top_k} experts per token; "
                f"use 1 to {model_top_k}"
            )
    return tiers


def make_clients(data: FederatedData, config: FederationConfig, tiers: list[TierConfig], seed: int) -> list[Client]:
    """All clients of the federation, each with its tier: shares are exact up to one client, the deal is an addressed draw."""
    count = len(data.names)
    bounds = np.cumsum([tier.share for tier in tiers]) / sum(tier.share for tier in tiers)
    order = np.arange(count)
    if config.assignment == "shuffled":
        order = generator(seed, "tiers").permutation(count)
    tier_of = np.minimum(np.searchsorted(bounds, (np.arange(count) + 0.5) / count), len(tiers) - 1)
    caps = np.empty(count, dtype=int)
    caps[order] = [tiers[t].top_k for t in tier_of]
    return [
        Client(i, name, int(caps[i]), int(data.samples[i]), int(data.train_sequences[i]), int(data.train_tokens[i]))
        for i, name in enumerate(data.names)
    ]
