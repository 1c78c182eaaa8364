"""Participants and placement: everyone exactly once, bounds respected, balanced, and a pure function of its input."""

from __future__ import annotations

import random
from dataclasses import replace

from every import every
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_ds.clients.client import Client
from fedmoe_ds.config import LocalConfig
from fedmoe_ds.federation.cost import CostModel
from fedmoe_ds.federation.sampling import participants
from fedmoe_ds.federation.schedule import schedule
from fedmoe_ds.model.client_slots import ClientSlots

COST = CostModel(dense=1000.0, expert=300.0)
LOCAL = LocalConfig(batch_size=4, max_steps=20)


def make_client(index: int, sequences: int, top_k: int) -> Client:
    return Client(index, f"client-{index}", top_k, sequences, sequences, sequences * 50, cap=top_k)


CLIENTS = st.lists(st.tuples(st.integers(1, 300), st.sampled_from([8, 4, 2, 1])), min_size=1, max_size=60).map(
    lambda pairs: [make_client(i, sequences, top_k) for i, (sequences, top_k) in enumerate(pairs)]
)
WORLDS = st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (1, 4), (3, 2), (8, 4)])
IN_FLIGHT = st.sampled_from([None, 1, 2, 3, 8])


@settings(max_examples=200, deadline=None)
@given(CLIENTS, WORLDS, IN_FLIGHT)
def test_everyone_exactly_once_within_bounds(chosen: list[Client], world: tuple[int, int], in_flight: int | None) -> None:
    clusters, ep_size = world
    plan = schedule(chosen, COST, LOCAL, clusters, ep_size, in_flight)
    assert len(plan) == clusters
    placed = [client.index for waves in plan for wave in waves for home in wave for client in home]
    assert sorted(placed) == [client.index for client in chosen]
    room = ClientSlots(min(in_flight or len(chosen), len(chosen)), ep_size).most
    for waves in plan:
        for wave in waves:
            assert len(wave) == ep_size and every(len(home) <= room for home in wave)
            assert 1 <= sum(map(len, wave)) <= (in_flight or len(chosen))
            sizes = [len(home) for home in wave]
            assert max(sizes) - min(sizes) <= 1, "a wave is dealt evenly to the ranks of its cluster"


@settings(max_examples=200, deadline=None)
@given(CLIENTS, WORLDS)
def test_clusters_are_balanced(chosen: list[Client], world: tuple[int, int]) -> None:
    """Longest first onto the least loaded: no cluster is ahead of another by more than one client's work."""
    plan = schedule(chosen, COST, LOCAL, world[0], world[1], None)
    loads = [sum(COST.client(c, LOCAL) for wave in waves for home in wave for c in home) for waves in plan]
    assert max(loads) - min(loads) <= max(COST.client(client, LOCAL) for client in chosen) * (1 + 1e-9)


def test_clients_with_long_answers_are_no_dearer_than_those_with_long_prompts() -> None:
    """Eight clients of one length; one learns ten times as many of its tokens. Each cluster gets four of them."""
    chosen = [replace(make_client(i, 40, 1), targets=40 * (30 if i == 5 else 3), rows=40 * 50) for i in range(8)]
    plan = schedule(chosen, COST, LOCAL, 2, 1, None)
    assert [sum(len(home) for wave in waves for home in wave) for waves in plan] == [4, 4]


@settings(max_examples=100, deadline=None)
@given(CLIENTS, WORLDS, IN_FLIGHT, st.randoms(use_true_random=False))
def test_a_function_of_the_set(
    chosen: list[Client], world: tuple[int, int], in_flight: int | None, shuffle: random.Random
) -> None:
    mixed = list(chosen)
    shuffle.shuffle(mixed)
    assert schedule(chosen, COST, LOCAL, *world, in_flight) == schedule(mixed, COST, LOCAL, *world, in_flight)


def test_waves_hold_clients_of_similar_cost() -> None:
    chosen = [make_client(i, 10 * (i + 1), 8) for i in range(8)]
    (waves,) = schedule(chosen, COST, LOCAL, 1, 2, 4)
    costs = [[COST.client(c, LOCAL) for home in wave for c in home] for wave in waves]
    assert [len(wave) for wave in costs] == [4, 4]
    assert min(costs[0]) >= max(costs[1])


def test_cost_grows_with_cap_and_tokens() -> None:
    base = COST.client(make_client(0, 20, 2), LOCAL)
    assert base == 2 * 20 * 50 * (1000 + 2 * 300), "5 steps of 4 sequences of 50 tokens, forward and backward"
    assert COST.client(make_client(0, 20, 4), LOCAL) > base < COST.client(make_client(0, 40, 2), LOCAL)
    assert COST.client(make_client(0, 4000, 2), LOCAL) == COST.client(make_client(0, 8000, 2), LOCAL), "max_steps bounds it"


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 200), st.floats(0.001, 1.0), st.integers(0, 10**9), st.integers(1, 1000))
def test_participants(count: int, share: float, seed: int, round_index: int) -> None:
    clients = [make_client(i, 5, 1) for i in range(count)]
    drawn = participants(clients, share, seed, round_index)
    indices = [client.index for client in drawn]
    assert len(indices) == max(1, round(share * count))
    assert indices == sorted(set(indices)), "canonical order, without replacement"
    assert drawn == participants(clients, share, seed, round_index), "addressed, not consumed"


def test_participants_differ_by_round_and_seed_and_reach_everyone() -> None:
    clients = [make_client(i, 5, 1) for i in range(30)]
    draws = {(seed, r): tuple(c.index for c in participants(clients, 0.3, seed, r)) for seed in range(2) for r in range(1, 30)}
    assert len(set(draws.values())) == len(draws)
    assert {index for draw in draws.values() for index in draw} == set(range(30))
