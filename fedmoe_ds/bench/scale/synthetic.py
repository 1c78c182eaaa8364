"""Synthetic clients for curves: sizes by a power law, budgets of four tiers; nothing is read or tokenised."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmoe_ds.clients.client import Population, make_clients
from fedmoe_ds.clients.tiers import Capacity, resolve_tiers
from fedmoe_ds.config import FederationConfig
from fedmoe_ds.data.dealing import Prepared
from fedmoe_ds.data.federated import FederatedData
from fedmoe_ds.data.sequences import Sequences
from fedmoe_ds.data.store import write_store, write_units

TOKENS_PER_SAMPLE = 200
SEED = 0
LONGEST = 48
_TOKENS = 24
_TOP_K, _RANK, _EXPERTS, _LAYERS = 8, 16, 64, 16


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


def content_of(samples: int) -> Sequences:
    """Encoded samples of 12 to 36 tokens; the first four of each are its prompt."""
    lengths = np.random.default_rng(SEED).integers(_TOKENS // 2, _TOKENS * 3 // 2, samples)
    ids = [np.arange(length) for length in lengths.tolist()]
    return Sequences(ids, [one > 3 for one in ids])


def store(prepared: Prepared, cache: Path) -> FederatedData:
    """Store what was dealt as a start does it, and open it as every rank does."""
    rows = len(prepared.content)
    header = {"sequence_length": LONGEST, "omissions": {"rows": rows, "total": {}, "clients": {}}, "reading": {}}
    write_store(cache / "deal", prepared, header, write_units(cache, prepared.content, header))
    return FederatedData.open(cache / "deal")


def clients_of(sizes: Sizes | FederatedData) -> Population:
    """Them with the default tiers of a model with top-k 8."""
    federation = FederationConfig()
    tiers = resolve_tiers(federation, Capacity(_TOP_K, _RANK, _EXPERTS, _LAYERS), "top_k")
    data: Any = sizes
    return make_clients(data, federation, tiers, SEED)
