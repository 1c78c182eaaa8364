"""Synthetic clients for curves: sizes by a power law, budgets of four tiers; nothing is read or tokenised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedmoe_ds.clients.client import Client, make_clients
from fedmoe_ds.clients.tiers import Capacity, resolve_tiers
from fedmoe_ds.config import FederationConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

TOKENS_PER_SAMPLE = 200
SEED = 0
_TOP_K, _RANK, _EXPERTS = 8, 16, 64


@dataclass(frozen=True)
class Sizes:
    """What prepared data say about clients, without the data."""

    names: list[str]
    samples: NDArray[np.int64]
    train_sequences: NDArray[np.int64]
    train_tokens: NDArray[np.int64]
    train_rows: NDArray[np.int64]
    tiers: list[str] | None = None


def sizes_of(count: int) -> Sizes:
    """`count` clients with 1 to a few hundred samples each."""
    samples = 1 + np.random.default_rng(SEED).zipf(1.8, count).clip(max=500)
    tokens = samples * TOKENS_PER_SAMPLE
    width = len(str(count - 1))
    return Sizes([f"client-{i:0{width}d}" for i in range(count)], samples, samples, tokens // 2, tokens)


def clients_of(sizes: Sizes) -> Sequence[Client]:
    """Them with the default tiers of a model with top-k 8."""
    federation = FederationConfig()
    tiers = resolve_tiers(federation, Capacity(_TOP_K, _RANK, _EXPERTS), "top_k")
    data: Any = sizes
    return make_clients(data, federation, tiers, SEED)
