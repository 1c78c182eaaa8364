"""Partitioners and hold-outs: every sample to exactly one owner, and the same one every time."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter

import numpy as np
import pytest
from every import every
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_ds.config.data_section import PartitionConfig
from fedmoe_ds.data import holdout
from fedmoe_ds.data.partition import Rows, largest_groups, power_law_sizes
from fedmoe_ds.data.partition import deal as deal_rows
from fedmoe_ds.data.ragged import Ragged
from fedmoe_ds.errors import UserError
from fedmoe_ds.randomness import generator

LABELS = st.lists(st.sampled_from(["a", "b", "c d", "é"]), min_size=2, max_size=60)
SEEDS = st.integers(0, 5)


def deal(labels: list[str], config: PartitionConfig, seed: int) -> dict[str, Rows]:
    """By name, which a test reads more easily."""
    names, rows = deal_rows(labels, config, seed)
    return dict(zip(names, rows, strict=True))


@settings(max_examples=60, deadline=None)
@given(labels=LABELS, seed=SEEDS, kind=st.sampled_from(["natural", "iid", "dirichlet", "quantity"]), data=st.data())
def test_every_sample_goes_to_exactly_one_client(labels: list[str], seed: int, kind: str, data: st.DataObject) -> None:
    clients = data.draw(st.integers(1, min(6, len(labels))))
    config = PartitionConfig(kind=kind, clients=None if kind == "natural" else clients, alpha=5.0)
    try:
        dealt = deal(labels, config, seed)
    except UserError as error:
        assert kind == "dirichlet" and "larger alpha" in str(error)
        return
    assert np.array_equal(np.sort(np.concatenate(list(dealt.values()))), np.arange(len(labels)))
    assert every(len(rows) > 0 and np.all(np.diff(rows) > 0) for rows in dealt.values())
    assert list(dealt) == sorted(dealt)
    again = deal(labels, config, seed)
    assert list(again) == list(dealt) and every(np.array_equal(again[name], dealt[name]) for name in dealt)
    if kind == "natural":
        assert every({labels[row] for row in rows} == {name} for name, rows in dealt.items())
    else:
        assert len(dealt) == clients


# What the partitioners of flwr-datasets 0.6.1 dealt from the same orders and seeds: SHA-256 over 72 deals of each kind.
DEALT_BY_FLOWER = {
    "natural": "0773fe1f73736d230e0bd701467a55f73f37b83b69dc3a7f67fb14244bbd40b5",
    "iid": "0901a6d3f1803a891717e86de439046440dfba23fa88ddaa95f2a1410392d17d",
    "dirichlet": "bcb21e4b7f93e761f18395f84e1fd72f486d7b62b042eb94a5dd52ffecff73f3",
    "quantity": "7298b3f3bc3132c7f6d7eb21b8e717cb5229a16555937311792f60801e5f0b6c",
}


@pytest.mark.parametrize("kind", DEALT_BY_FLOWER)
def test_clients_get_what_flower_dealt_them(kind: str) -> None:
    """Three sizes, four seeds, three alphas, two least sizes; four Dirichlet settings are impossible, there as here."""
    dealt = hashlib.sha256()
    for (samples, clients), seed, alpha, least in itertools.product(
        ((7, 2), (60, 5), (500, 12)), range(4), (0.05, 0.5, 3.0), (1, 3)
    ):
        labels = [("a", "b", "c d", "é")[row * row % 7 % 4] for row in range(samples)]
        config = PartitionConfig(
            kind=kind,
            clients=None if kind == "natural" else clients,
            alpha=alpha,
            min_samples=least if least * clients <= samples else 1,
        )
        try:
            parts = deal(labels, config, seed)
        except UserError:
            parts = {"refused": np.zeros(0, np.int64)}
        for name, rows in parts.items():
            dealt.update(f"{name}:{rows.tolist()}".encode())
    assert dealt.hexdigest() == DEALT_BY_FLOWER[kind]


@settings(max_examples=100, deadline=None)
@given(samples=st.integers(1, 500), data=st.data(), alpha=st.floats(0.01, 4))
def test_power_law_sizes_sum_up_and_fall(samples: int, data: st.DataObject, alpha: float) -> None:
    clients = data.draw(st.integers(1, min(samples, 40)))
    sizes = power_law_sizes(samples, clients, alpha)
    assert sum(sizes) == samples and len(sizes) == clients
    assert min(sizes) >= 1 and sizes.tolist() == sorted(sizes.tolist(), reverse=True)


def test_power_law_has_the_exponent() -> None:
    sizes = power_law_sizes(100_000, 8, 1.5)
    assert sizes[0] / sizes[3] == pytest.approx(4**1.5, rel=1e-2)


def test_dirichlet_skews_labels_and_alpha_controls_it() -> None:
    labels = ["a", "b", "c", "d"] * 250

    def largest_share(alpha: float) -> float:
        dealt = deal(labels, PartitionConfig(kind="dirichlet", clients=4, alpha=alpha), 3)
        shares = [np.unique([labels[r] for r in rows], return_counts=True)[1].max() / len(rows) for rows in dealt.values()]
        return float(np.mean(shares))

    assert largest_share(0.1) > 0.6 > 0.3 > largest_share(100.0)


def test_seeds_differ() -> None:
    labels = ["a", "b"] * 50
    for kind in ("iid", "dirichlet", "quantity"):
        first, second = (deal(labels, PartitionConfig(kind=kind, clients=3, alpha=2.0), seed) for seed in (0, 1))
        assert any(not np.array_equal(first[name], second[name]) for name in first)


def test_min_samples_is_kept_or_refused() -> None:
    labels = ["a", "b"] * 50
    dealt = deal(labels, PartitionConfig(kind="dirichlet", clients=4, alpha=1.0, min_samples=10), 0)
    assert min(map(len, dealt.values())) >= 10
    with pytest.raises(UserError, match=r"min_samples: 30: 4 clients would need 120 samples and there are 100"):
        deal(labels, PartitionConfig(kind="dirichlet", clients=4, min_samples=30), 0)
    with pytest.raises(UserError, match=r"larger alpha, fewer clients or a smaller min_samples"):
        deal(labels, PartitionConfig(kind="dirichlet", clients=10, alpha=0.01, min_samples=10), 0)


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "quantity"])
def test_more_clients_than_samples(kind: str) -> None:
    with pytest.raises(UserError, match=r"partition\.clients: 9: more clients than the 4 samples"):
        deal(["a"] * 4, PartitionConfig(kind=kind, clients=9), 0)
    with pytest.raises(UserError, match=r"partition\.clients: null: needed"):
        deal(["a"] * 4, PartitionConfig(kind=kind), 0)


def test_largest_groups_and_a_draw_among_equals() -> None:
    assert largest_groups(["b", "a", "c", "c"], [3, 2, 1, 2], 2, 0) == ["b", "c"]
    assert largest_groups(["b", "a", "c"], [1, 1, 1], None, 0) == ["a", "b", "c"]
    with pytest.raises(UserError, match=r"clients: 4: more than the 3 groups"):
        largest_groups(["b", "a", "c"], [1, 1, 1], 4, 0)
    seeds, names = 400, [f"c{index}" for index in range(8)]
    kept = Counter(name for seed in range(seeds) for name in largest_groups([*names, "z", "z"], [1] * 10, 3, seed))
    assert kept["z"] == seeds
    for name in names:  # two of eight, each in a quarter of the draws
        assert abs(kept[name] / seeds - 1 / 4) < 0.1, (name, kept)


def test_partitioning_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    deal(["a", "b"] * 20, PartitionConfig(), 0)
    deal(["a", "b"] * 20, PartitionConfig(kind="dirichlet", clients=8, alpha=0.3, min_samples=2), 0)
    assert capfd.readouterr() == ("", "")


@settings(max_examples=100, deadline=None)
@given(strata=LABELS, share=st.floats(0.01, 0.99), seed=SEEDS)
def test_global_holdout_leaves_every_stratum_something(strata: list[str], share: float, seed: int) -> None:
    if len(set(strata)) == len(strata):
        with pytest.raises(UserError, match=r"would empty a group"):
            holdout.draw_global(strata, share, seed)
        return
    held = holdout.draw_global(strata, share, seed)
    assert 1 <= len(held) == len(set(held.tolist())) <= len(strata) - len(set(strata))
    assert np.array_equal(held, holdout.draw_global(strata, share, seed))
    rest = np.setdiff1d(np.arange(len(strata)), held)
    assert {strata[row] for row in rest} == set(strata)


def test_global_holdout_is_stratified() -> None:
    strata = ["a"] * 100 + ["b"] * 300
    held = holdout.draw_global(strata, 0.1, 0)
    assert np.bincount(held >= 100).tolist() == [10, 30]


@settings(max_examples=100, deadline=None)
@given(samples=st.integers(1, 200), share=st.floats(0.001, 0.999), seed=SEEDS, limit=st.integers(1, 100))
def test_client_split_and_cap(samples: int, share: float, seed: int, limit: int) -> None:
    whole = Ragged.joined([np.arange(samples)])
    train, held = holdout.split_clients(whole, share, seed, ["x"])
    assert np.array_equal(np.sort(np.concatenate([train, held])), np.arange(samples))
    assert len(train) >= 1 and (len(held) >= 1) == (samples > 1)
    (rows,) = holdout.cap_clients(whole, limit, seed, ["x"])
    assert len(rows) == min(samples, limit) == len(set(rows.tolist()))
    assert holdout.cap_clients(whole, None, seed, ["x"]) is whole


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 30), min_size=2, max_size=12), share=st.floats(0.02, 0.6))
def test_expectation_of_the_global_holdout_is_proportional(sizes: list[int], share: float) -> None:
    """Over many draws every client gives in proportion to its share of the samples, whatever its name and size."""
    whole = np.array(sizes, dtype=np.int64)
    if whole.sum() == len(whole):
        return
    draws, total = 400, max(round(share * whole.sum()), 1)
    quotas = np.array([holdout.allocate(whole, share, generator(seed, "test")) for seed in range(draws)])
    assert (quotas <= whole - 1).all() and (quotas >= 0).all() and len(set(quotas.sum(1).tolist())) == 1
    ideal = total * whole / whole.sum()
    if (ideal > whole - 1).any():  # a client keeps one sample, and the others give for it
        return
    assert quotas.sum(1)[0] == total and (np.abs(quotas - ideal) < 1).all()
    fraction = ideal - np.floor(ideal)
    bound = 5 * np.sqrt(fraction * (1 - fraction) / draws) + 5 / draws  # five standard deviations of a mean of coins
    assert (np.abs(quotas.mean(0) - ideal) <= bound).all(), (quotas.mean(0), ideal)


def test_equal_clients_are_held_out_by_lot_and_not_by_name() -> None:
    strata = [f"c{client:04d}" for client in range(1000) for _ in range(2)]
    drawn = [{strata[row] for row in holdout.draw_global(strata, 0.05, seed)} for seed in range(3)]
    assert every(len(names) == 100 for names in drawn)
    assert len(drawn[0] & drawn[1]) < 30 and len(drawn[0] & drawn[2]) < 30  # ten are expected
    for names in drawn:
        tenths = np.bincount([int(name[1:]) // 100 for name in names], minlength=10)
        assert tenths.max() < 30, tenths
