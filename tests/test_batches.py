"""Local steps: batch contents and learning rates, as pure functions of the client's own facts."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from every import every
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_ds.clients.batches import batch_size, local_batches, step_count
from fedmoe_ds.clients.client import Client
from fedmoe_ds.clients.lr_schedule import learning_rate, round_rate
from fedmoe_ds.clients.pooled import pooled_batches, pooled_client
from fedmoe_ds.config import LocalConfig
from fedmoe_ds.federation.cost import CostModel


def make_client(sequences: int, index: int = 0) -> Client:
    return Client(index, f"client-{index}", 1, sequences, sequences, sequences * 10)


@pytest.mark.parametrize(
    ("settings", "sequences", "steps"),
    [
        ({"batch_size": 4}, 10, 3),
        ({"batch_size": 4, "epochs": 2.0}, 10, 5),
        ({"batch_size": 4, "epochs": 0.1}, 10, 1),
        ({"batch_size": 4, "epochs": 9.0, "max_steps": 7}, 10, 7),
        ({"batch_size": 4, "steps": 20, "max_steps": 7}, 10, 20),
        ({"batch_size": 64}, 10, 1),
        ({"batch_size": 8, "epochs": 5.0}, 2, 5),
        ({"batch_size": 8, "epochs": 5.0}, 3, 5),
        ({"batch_size": 8, "epochs": 5.0, "max_steps": 4}, 3, 4),
        ({"batch_size": 1, "epochs": 1.1}, 10, 11),
    ],
)
def test_step_count(settings: dict[str, Any], sequences: int, steps: int) -> None:
    client, config = make_client(sequences), LocalConfig(**settings)
    assert step_count(client, config) == steps
    batches = local_batches(client, config, 0, 1)
    assert [len(batch) for batch in batches] == [min(config.batch_size, sequences)] * steps
    assert batch_size(client, config) == min(config.batch_size, sequences)


def passes(epochs: float, sequences: int) -> Fraction:
    """Sequences that so many passes are, of the decimal number that a configuration says."""
    return Fraction(str(epochs)) * sequences


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(1, 600).map(lambda hundredths: hundredths / 100), st.integers(0, 99))
def test_epochs_are_passes_for_every_size(sequences: int, size: int, epochs: float, seed: int) -> None:
    """Rounded up to whole batches, whatever a client has; and the scheduler and the centralised bound say the same."""
    client, config = make_client(sequences), LocalConfig(batch_size=size, epochs=epochs)
    batches = local_batches(client, config, seed, 1)
    seen, asked = np.bincount(np.concatenate(batches), minlength=sequences), passes(epochs, sequences)
    assert asked <= seen.sum() < asked + batch_size(client, config)
    assert seen.min() >= int(epochs) and seen.max() <= math.ceil(seen.sum() / sequences)
    assert CostModel(1.0, 0.0).client(client, config) == pytest.approx(2 * 10 * int(seen.sum())), "forward and backward"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 16), st.sampled_from([0.5, 1.0, 3.0]))
def test_the_pooled_client_visits_what_its_members_do(sizes: list[int], batch: int, epochs: float) -> None:
    """Each of their sequences as often as they would, in whole batches but for the last."""
    clients, config = [make_client(n, i) for i, n in enumerate(sizes)], LocalConfig(batch_size=batch, epochs=epochs)
    members, first = clients[::2], np.cumsum([0, *sizes])
    visits = [local_batches(member, config, 0, 1) for member in members]
    expected = np.concatenate([np.concatenate(own) + first[m.index] for m, own in zip(members, visits, strict=True)])
    batches = pooled_batches(clients, members, config, 0, 1)
    assert np.array_equal(np.sort(np.concatenate(batches)), np.sort(expected))
    assert {len(part) for part in batches[:-1]} <= {batch} and 1 <= len(batches[-1]) <= batch
    assert pooled_client(clients, members, config, 0, 1).steps == len(batches)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 30), st.integers(0, 10**6))
def test_every_pass_sees_everything_once(sequences: int, size: int, steps: int, seed: int) -> None:
    client, config = make_client(sequences), LocalConfig(batch_size=size, steps=steps)
    flat = np.concatenate(local_batches(client, config, seed, 3))
    for start in range(0, len(flat), sequences):
        part = flat[start : start + sequences]
        assert len(set(part.tolist())) == len(part) and set(part.tolist()) <= set(range(sequences))
    again = local_batches(client, config, seed, 3)
    assert np.array_equal(flat, np.concatenate(again)), "addressed: asking twice changes nothing"


def test_order_differs_by_round_client_and_seed_only() -> None:
    config = LocalConfig(batch_size=5)
    orders = {
        (seed, r, index): np.concatenate(local_batches(make_client(20, index), config, seed, r)).tobytes()
        for seed in range(2)
        for r in (1, 2)
        for index in (0, 1)
    }
    assert len(set(orders.values())) == 8
    longer = LocalConfig(batch_size=5, epochs=3.0)
    first = np.concatenate(local_batches(make_client(20, 1), longer, 1, 2))[:20].tobytes()
    assert first == orders[1, 2, 1], "later passes do not change the first one"


def test_learning_rates() -> None:
    constant = LocalConfig(lr=0.1)
    assert [learning_rate(constant, 0.1, s, 4) for s in range(4)] == [0.1] * 4
    linear = LocalConfig(lr=0.1, schedule="linear", warmup=0.5)
    assert [learning_rate(linear, 0.1, s, 4) for s in range(4)] == pytest.approx([0.05, 0.1, 0.1, 0.05])
    cosine = LocalConfig(lr=0.1, schedule="cosine")
    assert [learning_rate(cosine, 0.1, s, 4) for s in range(4)] == pytest.approx(
        [0.05 * (1 + math.cos(math.pi * s / 4)) for s in range(4)]
    )
    assert learning_rate(LocalConfig(lr=0.1, schedule="cosine", warmup=0.9), 0.1, 0, 1) == pytest.approx(0.1)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["constant", "linear", "cosine"]), st.floats(0, 0.99), st.integers(1, 50))
def test_learning_rates_stay_in_range(schedule: Any, warmup: float, steps: int) -> None:
    config = LocalConfig(lr=0.1, schedule=schedule, warmup=warmup)
    rates = [learning_rate(config, 0.1, step, steps) for step in range(steps)]
    assert every(0 < rate <= 0.1 + 1e-12 for rate in rates), "every step moves something"
    peak = int(np.argmax(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1]) and rates[peak:] == sorted(rates[peak:], reverse=True)


def test_rates_across_rounds_are_those_of_flowertune() -> None:
    """Its 200 rounds: 5e-5 to 1e-6 by its own formula, written out; a local schedule starts from the round's rate."""
    tuned = LocalConfig(lr=5e-5, rounds_schedule="cosine", final_lr=1e-6)
    rates = [round_rate(tuned, t, 200) for t in range(1, 201)]
    assert rates == pytest.approx([1e-6 + 0.5 * 4.9e-5 * (1 + math.cos(math.pi * t / 200)) for t in range(1, 201)], rel=1e-12)
    assert rates[0] == pytest.approx(5e-5, rel=1e-3) and rates[99] == pytest.approx(2.55e-5) and rates[-1] == 1e-6
    linear = LocalConfig(lr=0.4, rounds_schedule="linear", final_lr=0.1)
    assert [round_rate(linear, t, 3) for t in (1, 2, 3)] == pytest.approx([0.3, 0.2, 0.1])
    assert [round_rate(LocalConfig(lr=0.1), t, 3) for t in (1, 2, 3)] == [0.1] * 3
    assert [learning_rate(linear, 0.3, step, 2) for step in (0, 1)] == [0.3, 0.3]


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["linear", "cosine"]), st.floats(1e-8, 1.0), st.floats(1e-8, 1.0), st.integers(1, 300))
def test_rates_across_rounds_fall_to_the_final_one(schedule: Any, lr: float, final: float, rounds: int) -> None:
    config = LocalConfig(lr=lr, rounds_schedule=schedule, final_lr=final)
    rates = [round_rate(config, t, rounds) for t in range(1, rounds + 1)]
    low, high = min(lr, final), max(lr, final)
    assert every(low * (1 - 1e-9) <= rate <= high * (1 + 1e-9) for rate in rates)
    assert rates == sorted(rates, reverse=lr >= final) and rates[-1] == pytest.approx(final)
