"""Clients and their budget tiers."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import pytest
from every import every
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_ds.clients.client import Client, Count, Population, counts_of, make_clients, richest, top_k_of
from fedmoe_ds.clients.client import tiers_of as clients_by_tier
from fedmoe_ds.clients.pooled import pooled_client
from fedmoe_ds.clients.tiers import BudgetKind, Capacity, Tier, default_tiers, resolve_tiers
from fedmoe_ds.config import FederationConfig, LocalConfig, TierConfig
from fedmoe_ds.data import FederatedData
from fedmoe_ds.data.omissions import Omissions
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation.sampling import participants

FULL = Capacity(top_k=8, rank=16, experts=64, layers=16)


def make_data(count: int) -> FederatedData:
    """Sizes without any sequences behind them."""
    sizes = np.arange(1, count + 1, dtype=np.int64)
    names = [f"client-{i:04d}" for i in range(count)]
    return FederatedData(names, sizes, sizes, sizes * 10, sizes * 10, 16, "", Omissions(), Path(), cast(Any, None))


def deal(count: int, tiers: list[TierConfig], seed: int = 0, **federation: Any) -> Population:
    config = FederationConfig(tiers=tiers, **federation)
    return make_clients(make_data(count), config, resolve_tiers(config, FULL, "top_k"), seed)


def tiers_of(*pairs: tuple[int, float]) -> list[TierConfig]:
    return [TierConfig(top_k=top_k, share=share) for top_k, share in pairs]


def test_default_tiers_halve() -> None:
    assert [(tier.top_k, tier.share) for tier in default_tiers(8)] == [(8, 1.0), (4, 1.0), (2, 1.0), (1, 1.0)]
    assert [tier.top_k for tier in default_tiers(6)] == [6, 3, 1]
    assert [tier.top_k for tier in default_tiers(1)] == [1]


def test_clients_carry_their_facts() -> None:
    clients = deal(5, default_tiers(8))
    assert [(c.index, c.name, c.samples, c.sequences, c.targets) for c in clients] == [
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
    assert every(sorted(caps) == [1] * 6 + [4] * 2 for caps in shuffled)
    assert len({tuple(caps) for caps in shuffled}) > 1, "the deal is drawn from the seed"
    assert shuffled[0] == [c.top_k for c in deal(8, tiers, 0)]


def bought(config: FederationConfig, spends: BudgetKind) -> list[tuple[int, int, int]]:
    return [(tier.cap, tier.rank, tier.experts) for tier in resolve_tiers(config, FULL, spends)]


def test_what_a_budget_buys() -> None:
    """Each method spends the tier's fraction of the largest budget on its own resource; everything else stays whole."""
    config = FederationConfig(tiers=tiers_of((8, 1.0), (4, 2.0), (1, 1.0)))
    assert bought(config, "top_k") == [(8, 16, 64), (4, 16, 64), (1, 16, 64)]
    assert bought(config, "rank") == [(8, 16, 64), (8, 8, 64), (8, 2, 64)]
    assert bought(config, "experts") == [(8, 16, 64), (8, 16, 32), (8, 16, 8)]
    assert bought(config, "layers") == [(8, 16, 64)] * 3
    assert [tier.layers for tier in resolve_tiers(config, FULL, "layers")] == [16, 8, 2]
    assert [tier.layers for tier in resolve_tiers(config, FULL, "rank")] == [None] * 3
    named = [(tier.top_k, tier.share) for tier in resolve_tiers(config, FULL, "rank")]
    assert named == [(8, 1.0), (4, 2.0), (1, 1.0)], "a tier is named by its FLOPs, whatever they buy"


def test_the_configuration_overrules_the_method() -> None:
    tiers = tiers_of((8, 1.0), (4, 1.0))
    assert bought(FederationConfig(tiers=tiers, budget="top_k"), "rank") == [(8, 16, 64), (4, 16, 64)]
    assert bought(FederationConfig(tiers=tiers, budget="rank"), "experts") == [(8, 16, 64), (8, 8, 64)]
    assert bought(FederationConfig(tiers=tiers, budget="both"), "top_k") == [(8, 16, 64), (4, 8, 64)]


def test_a_tier_may_say_its_own_numbers() -> None:
    tiers = [TierConfig(top_k=4, share=1.0, rank=3, experts=5)]
    assert bought(FederationConfig(tiers=tiers), "rank") == [(8, 3, 64)]
    assert bought(FederationConfig(tiers=tiers), "experts") == [(8, 16, 5)]
    assert bought(FederationConfig(tiers=tiers), "top_k") == [(4, 16, 64)], "not spent on it: not bought"


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 64), st.integers(1, 64))
def test_everyone_can_buy_at_least_one(top_k: int, rank: int, experts: int, layers: int) -> None:
    full = Capacity(top_k, rank, experts, layers)
    for spends in get_args(BudgetKind):
        tiers = resolve_tiers(FederationConfig(), full, spends)
        assert (tiers[0].cap, tiers[0].rank, tiers[0].experts) == (top_k, rank, experts)
        assert tiers[0].layers == (layers if spends == "layers" else None)
        assert every(min(tier.cap, tier.rank, tier.experts, tier.layers or 1) >= 1 for tier in tiers)


def test_clients_carry_what_their_tier_buys() -> None:
    config = FederationConfig(tiers=tiers_of((8, 1.0), (2, 1.0)), assignment="in_order")
    clients = make_clients(make_data(4), config, resolve_tiers(config, FULL, "rank"), 0)
    assert [(c.top_k, c.cap, c.rank, c.experts) for c in clients] == [(8, 8, 16, 64)] * 2 + [(2, 8, 4, 64)] * 2


def test_tiers_are_checked_against_the_model() -> None:
    defaults = resolve_tiers(FederationConfig(), FULL, "top_k")
    assert defaults == [Tier(cap, 1.0, cap, 16, 64, str(cap)) for cap in (8, 4, 2, 1)]
    given_tiers = FederationConfig(tiers=tiers_of((8, 1.0), (2, 1.0)))
    with pytest.raises(UserError, match=r"^federation.tiers.0.top_k: 8: the model activates 4 experts per token; use 1 to 4"):
        resolve_tiers(given_tiers, Capacity(4, 16, 64, 16), "top_k")
    with pytest.raises(UserError, match=r"^federation.tiers: \[\]: at least one tier is needed"):
        resolve_tiers(FederationConfig(tiers=[]), FULL, "top_k")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rank", 17, "the model has 16 LoRA rows; use 1 to 16"),
        ("experts", 65, "the model has 64 experts per layer; use 1 to 64"),
        ("layers", 17, "the model has 16 layers; use 1 to 16"),
    ],
)
def test_explicit_numbers_are_checked_too(key: str, value: int, message: str) -> None:
    tier = TierConfig.model_validate({"top_k": 4, "share": 1.0, key: value})
    with pytest.raises(UserError, match=f"^federation.tiers.0.{key}: {value}: {message}$"):
        resolve_tiers(FederationConfig(tiers=[tier]), FULL, "top_k")


def named(*pairs: tuple[int, list[str]]) -> list[TierConfig]:
    return [TierConfig(top_k=top_k, clients=clients) for top_k, clients in pairs]


def test_named_clients_have_the_tier_that_names_them() -> None:
    tiers = named((8, ["client-0002"]), (2, ["client-0000", " client-0001 "]))
    assert [client.top_k for client in deal(3, tiers, seed=4)] == [2, 2, 8], "whatever the seed, and whatever spaces a name has"


@pytest.mark.parametrize(
    ("tiers", "federation", "message"),
    [
        (
            named((8, ["client-0000", "client-0009"])),
            {},
            r"tiers\.0\.clients: client-0009: no client has this name; did",
        ),
        (named((8, ["client-0000"]), (4, ["client-0000"])), {}, r"tiers\.1\.clients: client-0000: tier 0 names it, too"),
        (named((8, ["client-0000"])), {}, r"tiers: client client-0001 and 1 more: in no tier; name every client"),
        ([*named((8, ["client-0000"])), TierConfig(top_k=4)], {}, r"tiers\.1\.clients: missing: other tiers name theirs"),
        ([TierConfig(top_k=4, share=1.0, clients=["client-0000"])], {}, r"tiers\.0\.share: 1\.0: .* names its clients; drop"),
        ([TierConfig(top_k=4)], {}, r"tiers\.0\.share: missing; give it as number > 0, or name"),
        (named((8, ["client-0000"])), {"assignment": "in_order"}, r"assignment: in_order: nobody is dealt"),
        (named((8, ["client-0000"])), {"tier_column": "plan"}, r"tier_column: plan: federation\.tiers\.N\.clients names the"),
    ],
)
def test_clients_without_one_tier_are_refused(tiers: list[TierConfig], federation: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"^federation\.{message}"):
        deal(3, tiers, **federation)


def test_a_column_says_the_label_of_the_tier() -> None:
    config = FederationConfig(tiers=[TierConfig(top_k=4, rank=2), TierConfig(top_k=4, rank=1)], tier_column="plan")
    tiers = resolve_tiers(config, FULL, "rank")
    clients = make_clients(replace(make_data(3), tiers=["4 r1", "4 r2", "4 r1"]), config, tiers, 0)
    assert [client.rank for client in clients] == [1, 2, 1]
    with pytest.raises(UserError, match=r"^federation\.tier_column: plan: client client-0001 has tier '4', and .* 4 r2, 4 r1;"):
        make_clients(replace(make_data(2), tiers=["4 r1", "4"]), config, tiers, 0)


def one_by_one(data: FederatedData, dealt: list[Tier]) -> list[Client]:
    """The clients as objects, which is what a population stands for."""
    return [
        Client(i, name, tier.top_k, int(data.samples[i]), int(data.train_sequences[i]), int(data.train_tokens[i]), tier.cap,
               tier.rank, tier.experts, tier=tier.label, rows=int(data.train_rows[i]))
        for i, (name, tier) in enumerate(zip(data.names, dealt, strict=True))
    ]  # fmt: skip


TIERS = st.lists(st.tuples(st.sampled_from([8, 4, 2]), st.sampled_from([None, 2, 4])), min_size=1, max_size=5)


@settings(max_examples=80, deadline=None)
@given(count=st.integers(1, 60), drawn=TIERS, seed=st.integers(0, 100))
def test_a_population_is_what_its_clients_are(count: int, drawn: list[tuple[int, int | None]], seed: int) -> None:
    """Against the list of all of them: tiers of one budget, tiers that nobody is of, draws of every kind, the pooled client."""
    config = FederationConfig(tiers=[TierConfig(top_k=top_k, rank=rank, share=1.0) for top_k, rank in drawn])
    tiers, data = resolve_tiers(config, FULL, "rank"), make_data(count)
    population = make_clients(data, config, tiers, seed)
    labels = {tier.label: tier for tier in tiers}
    plain = one_by_one(data, [labels[client.tier] for client in population])
    assert len(population) == count and population == plain and population[::2] == plain[::2] and population[-1] == plain[-1]
    ours, theirs = clients_by_tier(population), clients_by_tier(plain)
    assert list(ours) == list(theirs) and every(ours[label] == theirs[label] for label in theirs)
    assert richest(population) == richest(plain) and top_k_of(population).tolist() == top_k_of(plain).tolist()
    whats: tuple[Count, ...] = ("samples", "sequences", "targets", "token_rows", "index")
    for what in whats:
        assert counts_of(population, what).tolist() == counts_of(plain, what).tolist()
    assert [tier.label for tier in population.tiers_N()] == [client.tier for client in plain]
    for sampling in ("uniform", "size", "budget"):
        members = participants(population, 0.4, seed, 1, sampling)
        assert members == participants(plain, 0.4, seed, 1, sampling)
    local = LocalConfig(batch_size=4)
    assert pooled_client(population, members, local, seed, 1) == pooled_client(plain, members, local, seed, 1)


def test_a_million_clients_are_no_objects() -> None:
    """No wall-clock: what is counted is how many clients are made."""
    made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "fedmoe_ds.clients.client.Client", lambda *args, **keywords: made.append(args) or Client(*args, **keywords)
        )
        clients = deal(100_000, default_tiers(8))
        tiers, members = clients_by_tier(clients), participants(clients, 0.001, 0, 1, "size")
        assert sum(map(len, tiers.values())) == len(clients) == 100_000 and len(members) == 100
        richest(clients)
    assert len(made) == 101
