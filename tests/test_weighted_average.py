"""Mergeable statistics: weighted means, untouched experts, no dependence on the order of clients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from every import every
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_ds.aggregation.lora_factors import Collection
from fedmoe_ds.aggregation.weighted_average import Statistics
from fedmoe_ds.model.adapter_bank import Bank, BlockSpec

EXPERT = BlockSpec("experts.down.lora_A", (0, 1), (2, 3), expert=True)
DENSE = BlockSpec("attention.q_proj.lora_B", (0, 1), (4,))
PERSONAL = BlockSpec("rescaler", (-1,), (1,), personal=True)
FROZEN = BlockSpec("experts.up.lora_A", (0, 1), (2, 3), expert=True, trained=False)
SPECS = [EXPERT, DENSE, PERSONAL, FROZEN]
EXPERTS, CLIENTS = 3, 4


def make_bank(clients: int, seed: int) -> Bank:
    bank = Bank(SPECS, EXPERTS, clients)
    for value in bank.values.values():
        value.normal_(generator=torch.Generator().manual_seed(seed))
    return bank


def weights(seed: int) -> np.ndarray:
    """[C, L, E], some of them zero; nobody trained expert 1 of layer 0."""
    drawn = np.random.default_rng(seed).random((CLIENTS, 2, EXPERTS))
    drawn[drawn < 0.3] = 0.0
    drawn[:, 0, 1] = 0.0
    return drawn


def collect(bank: Bank, weights_CLE: np.ndarray, order: list[int], exact: bool = True) -> Statistics:
    statistics = Statistics(SPECS, EXPERTS, exact)
    for client in order:
        statistics.add(EXPERT.name, bank.client(EXPERT.name, client), weights_CLE[client])
        statistics.add(DENSE.name, bank.client(DENSE.name, client), np.full(2, 0.1 * (client + 1)))
    return statistics


@pytest.mark.parametrize("exact", [True, False])
def test_weighted_mean(exact: bool) -> None:
    bank, current, weights_CLE = make_bank(CLIENTS, 0), make_bank(1, 1), weights(0)
    average = collect(bank, weights_CLE, list(range(CLIENTS)), exact).average(current)
    assert set(average) == {EXPERT.name, DENSE.name}, (
        "personal state is nobody else's business, and what nobody trains has no mean"
    )
    for layer in range(2):
        for expert in range(EXPERTS):
            values = torch.stack([bank.client(EXPERT.name, c)[layer, expert] for c in range(CLIENTS)]).double()
            share = torch.from_numpy(weights_CLE[:, layer, expert])
            old = current.client(EXPERT.name, 0)[layer, expert]
            expected = (values * share[:, None, None]).sum(0) / share.sum() if share.sum() > 0 else old.double()
            assert torch.allclose(average[EXPERT.name][layer, expert].double(), expected, atol=1e-6)
    shares = torch.arange(1, CLIENTS + 1, dtype=torch.float64) * 0.1
    dense = torch.stack([bank.client(DENSE.name, c) for c in range(CLIENTS)]).double()
    assert torch.allclose(average[DENSE.name].double(), (dense * shares[:, None, None]).sum(0) / shares.sum(), atol=1e-6)


def test_what_nobody_trained_keeps_its_value() -> None:
    current = make_bank(1, 1)
    average = collect(make_bank(CLIENTS, 0), weights(0), [0, 1, 2, 3]).average(current)
    assert torch.equal(average[EXPERT.name][0, 1], current.client(EXPERT.name, 0)[0, 1])
    nobody = Statistics(SPECS, EXPERTS, exact=True).average(current)
    assert every(torch.equal(nobody[name], current.client(name, 0)) for name in nobody)


@settings(max_examples=50, deadline=None)
@given(st.permutations(range(CLIENTS)), st.integers(0, 1000))
def test_the_order_of_clients_does_not_matter(order: list[int], seed: int) -> None:
    bank, current, weights_CLE = make_bank(CLIENTS, seed), make_bank(1, seed + 1), weights(seed)
    one = collect(bank, weights_CLE, list(range(CLIENTS)))
    other = collect(bank, weights_CLE, order)
    assert every(torch.equal(one.average(current)[name], other.average(current)[name]) for name in one.values)
    sums = zip(one.tensors(), other.tensors(), strict=True)
    assert every(torch.equal(ours[3], theirs[3]) for ours, theirs in sums)


@settings(max_examples=50, deadline=None)
@given(st.floats(1e-8, 1.0), st.integers(0, 1000))
def test_one_client_is_returned_exactly(weight: float, seed: int) -> None:
    """w v / w is v to the last bit, whatever the weight."""
    bank = make_bank(1, seed)
    statistics = Statistics(SPECS, EXPERTS, exact=True)
    statistics.add(EXPERT.name, bank.client(EXPERT.name, 0), np.full((2, EXPERTS), weight))
    statistics.add(DENSE.name, bank.client(DENSE.name, 0), np.full(2, weight))
    average = statistics.average(make_bank(1, seed + 1))
    assert every(torch.equal(average[name], bank.client(name, 0)) for name in average)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 1000))
def test_what_all_clients_agree_on_is_the_mean(seed: int, weight_seed: int) -> None:
    """Weights are shares of a whole: clients that return the same value give that value, bit by bit, however they weigh."""
    one = make_bank(1, seed)
    weights_CLE = np.maximum(weights(weight_seed), 1e-6)
    statistics = Statistics(SPECS, EXPERTS, exact=True)
    for client in range(CLIENTS):
        statistics.add(EXPERT.name, one.client(EXPERT.name, 0), weights_CLE[client])
        statistics.add(DENSE.name, one.client(DENSE.name, 0), weights_CLE[client, :, 0])
    average = statistics.average(make_bank(1, seed + 1))
    assert every(torch.equal(average[name], one.client(name, 0)) for name in average)


def test_state_is_everything() -> None:
    """Sums that are copied one by one into empty statistics give the same means: what a checkpoint relies on."""
    current = make_bank(1, 1)
    full = collect(make_bank(CLIENTS, 0), weights(0), [0, 1, 2, 3])
    copy = Statistics(SPECS, EXPERTS, exact=True)
    for (*_, ours), (*_, theirs) in zip(copy.tensors(), full.tensors(), strict=True):
        ours.copy_(theirs)
    assert every(torch.equal(full.average(current)[name], copy.average(current)[name]) for name in full.values)


@pytest.mark.parametrize("exact", [True, False])
def test_sums_travel_where_they_lie(exact: bool) -> None:
    """One piece of memory holds every sum and nothing else, dense sums first: adding memories adds statistics."""
    bank, weights_CLE = make_bank(CLIENTS, 0), weights(0)
    one, other, both = (collect(bank, weights_CLE, clients, exact) for clients in ([0, 2], [3], [0, 2, 3]))
    everything = {(spec.name, side): tensor for spec, side, _, tensor in one.tensors()}
    tensors = {key: tensor for key, tensor in everything.items() if key[1] in ("values", "weights")}
    windows = sum(tensor.numel() for tensor in everything.values()) - sum(tensor.numel() for tensor in tensors.values())
    assert windows == one.windows.memory.numel() == other.windows.memory.numel()
    assert sum(tensor.numel() for tensor in tensors.values()) == one.flat.memory.numel()
    dense = [tensor for (name, _), tensor in tensors.items() if name == DENSE.name]
    assert sum(tensor.numel() for tensor in dense) == one.flat.dense.numel()
    assert every(tensor.is_contiguous() for tensor in tensors.values())
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    one.flat.dense.zero_()
    for (name, side), tensor in tensors.items():
        assert torch.equal(tensor, torch.zeros_like(tensor) if name == DENSE.name else before[name, side])
    one = collect(bank, weights_CLE, [0, 2], exact)
    assert torch.equal(torch.maximum(one.windows.memory, other.windows.memory), both.windows.memory)
    assert set(both.windows.memory.tolist()) <= {-64, 0}, "products of one size share a window: nothing has to be shifted"
    one.flat.memory.add_(other.flat.memory)
    same = torch.equal if exact else torch.allclose
    assert same(one.flat.memory, both.flat.memory)


def test_nothing_to_sum() -> None:
    """Methods that collect every factor average nothing else, or nothing dense."""
    nothing, experts = Statistics([PERSONAL, FROZEN], EXPERTS, exact=True), Statistics([EXPERT], EXPERTS, exact=True)
    assert nothing.flat.memory.numel() == 0 and not list(nothing.tensors()) and nothing.average(make_bank(1, 0)) == {}
    assert experts.flat.dense.numel() == 0 and experts.flat.memory.numel() == 2 * 2 * EXPERTS * (2 * 3 + 1)


def test_a_collection_keeps_every_factor_at_its_place() -> None:
    pair = [EXPERT, replace(EXPERT, name="experts.down.lora_B", item=(5, 2))]
    dense = [replace(DENSE, name="attention.q_proj.lora_A", item=(2, 4)), replace(DENSE, item=(6, 2))]
    collection = Collection([*pair, *dense], EXPERTS, participants=2)
    values = {spec.name: torch.randn(2, *((EXPERTS,) if spec.expert else ()), *spec.item) for spec in [*pair, *dense]}
    for spec in [*pair, *dense]:
        collection.add(1, spec.name, values[spec.name], np.full(values[spec.name].shape[: 2 if spec.expert else 1], 0.5))
    for spec in [*pair, *dense]:
        assert torch.equal(collection.factors[spec.name][1], values[spec.name])
        assert not collection.factors[spec.name][0].any() and not collection.weights[spec.name][0].any()
        assert (collection.weights[spec.name][1] == 0.5).all()
