"""Clients and their budget tiers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_ds.clients.client import Client, default_tiers, make_clients, resolve_tiers
from fedmoe_ds.config import FederationConfig, TierConfig
from fedmoe_ds.data import FederatedData
from fedmoe_ds.errors import UserError


def make_data(count: int) -> FederatedData:
    """Sizes without any sequences behind them."""
    sizes = np.arange(1, count + 1, dtype=np.int64)
    names = [f"client-{i:04d}" for i in range(count)]
    return FederatedData(names, sizes, sizes, sizes * 10, {}, 16, "", 0, Path(), cast(Any, None))


def deal(count: int, tiers: list[TierConfig], seed: int = 0, **federation: Any) -> list[Client]:
    return make_clients(make_data(count), FederationConfig(**federation), tiers, seed)


def tiers_of(*pairs: tuple[int, float]) -> list[TierConfig]:
    return [TierConfig(top_k=top_k, share=share) for top_k, share in pairs]


def test_default_tiers_halve() -> None:
    assert [(tier.top_k, tier.share) for tier in default_tiers(8)] == [(8, 1.0), (4, 1.0), (2, 1.0), (1, 1.0)]
    assert [tier.top_k for tier in default_tiers(6)] == [6, 3, 1]
    assert [tier.top_k for tier in default_tiers(1)] == [1]


def test_clients_carry_their_facts() -> None:
    clients = deal(5, default_tiers(8))
    assert [(c.index, c.name, c.samples, c.sequences, c.tokens) for c in clients] == [
        (i, f"client-{i:04d}", i + 1, i + 1, 10 * (i + 1)) for i in range(5)
    ]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 200), st.lists(st.floats(0.05, 5.0), min_size=1, max_size=6), st.integers(0, 10**6))
def test_shares_are_exact_up_to_one_client(count: int, shares: list[float], seed: int) -> None:
    tiers = tiers_of(*((top_k + 1, share) for top_k, share in enumerate(shares)))
    found = Counter(client.top_k for client in deal(count, tiers, seed))
    for tier in tiers:
        assert abs(found[tier.top_k] - count * tier.share / sum(shares)) <= 1.0 + 1e-9


def test_assignment() -> None:
    tiers = tiers_of((4, 1.0), (1, 3.0))
    assert [c.top_k for c in deal(8, tiers, assignment="in_order")] == [4, 4, 1, 1, 1, 1, 1, 1]
    shuffled = [[c.top_k for c in deal(8, tiers, seed)] for seed in range(6)]
    assert all(sorted(caps) == [1] * 6 + [4] * 2 for caps in shuffled)
    assert len({tuple(caps) for caps in shuffled}) > 1, "the deal is drawn from the seed"
    assert shuffled[0] == [c.top_k for c in deal(8, tiers, 0)]


def test_tiers_are_checked_against_the_model() -> None:
    assert resolve_tiers(FederationConfig(), 8) == default_tiers(8)
    given_tiers = FederationConfig(tiers=tiers_of((8, 1.0), (2, 1.0)))
    assert resolve_tiers(given_tiers, 8) == given_tiers.tiers
    with pytest.raises(UserError, match=r"^federation.tiers.0.top_k: 8: the model activates 4 experts per token; use 1 to 4"):
        resolve_tiers(given_tiers, 4)
    with pytest.raises(UserError, match=r"^federation.tiers: \[\]: at least one tier is needed"):
        resolve_tiers(FederationConfig(tiers=[]), 4)
