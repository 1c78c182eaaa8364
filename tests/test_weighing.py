"""Weights that are not those of one mean: factors on changes with tallies, against loops in float64."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from every import every
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmoe_ds.aggregation.round_sums import RoundSums
from fedmoe_ds.aggregation.weighing import Weighing
from fedmoe_ds.aggregation.weighted_average import Statistics
from fedmoe_ds.errors import UserError
from fedmoe_ds.model.adapter_bank import Bank, BlockSpec

EXPERT = BlockSpec("experts.down.lora_A", (0, 1), (2, 3), expert=True)
DENSE = BlockSpec("attention.q_proj.lora_B", (0, 1), (4,))
SPECS = [EXPERT, DENSE]
EXPERTS, CLIENTS = 3, 4
NAMES = ("steps", "share")


def make_bank(clients: int, seed: int) -> Bank:
    bank = Bank(SPECS, EXPERTS, clients)
    for value in bank.values.values():
        value.normal_(generator=torch.Generator().manual_seed(seed))
    return bank


def numbers(seed: int, spec: BlockSpec) -> np.ndarray:
    """[C, *head], some of them zero; nobody has weight in the first place of the first layer."""
    head = (2, EXPERTS) if spec.expert else (2,)
    drawn = np.random.default_rng(seed).random((CLIENTS, *head))
    drawn[drawn < 0.3] = 0.0
    drawn.reshape(CLIENTS, -1)[:, 0] = 0.0
    return drawn


def places(spec: BlockSpec) -> Iterator[tuple[int, ...]]:
    yield from np.ndindex(2, *((EXPERTS,) if spec.expert else ()))


def sums_of(specs: list[BlockSpec], weighing: Weighing, exact: bool = True) -> RoundSums:
    return RoundSums(specs, EXPERTS, exact, weighing=weighing)


# Changes


def fold_changes(sums: RoundSums, bank: Bank, current: Bank, seed: int, order: list[int]) -> None:
    for client in order:
        for spec in SPECS:
            tallies = {name: numbers(seed + 1 + i, spec)[client] for i, name in enumerate(sums.statistics.weighing.tallies)}
            change = bank.client(spec.name, client) - current.client(spec.name, 0)
            sums.add(client, spec, change, [numbers(seed, spec)[client]], tallies)


def ratio(tallies: dict[str, np.ndarray]) -> np.ndarray:
    return tallies["steps"] / tallies["share"]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("tallies", [(), NAMES])
def test_changes_are_added_and_not_divided(exact: bool, tallies: tuple[str, ...]) -> None:
    bank, current = make_bank(CLIENTS, 0), make_bank(1, 1)
    sums = sums_of(SPECS, Weighing(changes=True, tallies=tallies), exact)
    fold_changes(sums, bank, current, 7, list(range(CLIENTS)))
    found = sums.average(current, ratio if tallies else lambda none: 2.0)
    for spec in SPECS:
        weights, steps, share = (numbers(7 + i, spec).sum(0) for i in range(3))
        for place in places(spec):
            old = current.client(spec.name, 0)[place].double()
            moved = sum(
                float(numbers(7, spec)[(c, *place)]) * (bank.client(spec.name, c)[place].double() - old) for c in range(CLIENTS)
            )
            factor = float(steps[place] / share[place]) if tallies and weights[place] else 2.0
            assert torch.allclose(found[spec.name][place], old + factor * moved, atol=1e-6, rtol=0)
            assert bool(sums.trained(spec.name)[place]) == bool(weights[place] > 0)
    assert found[EXPERT.name].dtype == torch.float64, "a server step sees the change before it is rounded"


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(CLIENTS)), st.integers(0, 1000))
def test_the_order_of_changes_and_tallies_does_not_matter(order: list[int], seed: int) -> None:
    bank, current = make_bank(CLIENTS, seed), make_bank(1, seed + 1)
    one, other = (sums_of(SPECS, Weighing(changes=True, tallies=NAMES)) for _ in range(2))
    fold_changes(one, bank, current, seed, list(range(CLIENTS)))
    fold_changes(other, bank, current, seed, order)
    assert every(torch.equal(ours[3], theirs[3]) for ours, theirs in zip(one.tensors(), other.tensors(), strict=True))


def test_what_nobody_changed_keeps_its_bits() -> None:
    """Whatever the factor: no change is added, and nothing is multiplied and divided on the way."""
    current = make_bank(1, 1)
    sums = sums_of(SPECS, Weighing(changes=True))
    for spec in SPECS:
        for client in range(CLIENTS):
            sums.add(client, spec, torch.zeros_like(current.client(spec.name, 0)), [numbers(3, spec)[client]])
    found = sums.average(current, lambda none: 1e6 / 3)
    assert every(torch.equal(found[spec.name].float(), current.client(spec.name, 0)) for spec in SPECS)


def test_a_factor_that_is_not_finite_is_refused_where_somebody_trained() -> None:
    bank, current = make_bank(CLIENTS, 0), make_bank(1, 1)
    sums = sums_of(SPECS, Weighing(changes=True, tallies=("share",)))
    for client in range(CLIENTS):
        for spec in SPECS:
            change = bank.client(spec.name, client) - current.client(spec.name, 0)
            sums.add(client, spec, change, [numbers(7, spec)[client]], {"share": numbers(7, spec)[client]})
    # One over the share is infinite where nobody has weight, which is nobody's concern.
    sums.average(current, lambda tallies: 1 / tallies["share"])
    with pytest.raises(UserError, match="not finite"):
        sums.average(current, lambda tallies: tallies["share"] * np.inf)


def test_tallies_are_sums_beside_the_others_and_part_of_the_state() -> None:
    bank, current = make_bank(CLIENTS, 0), make_bank(1, 1)
    plain, full, copy = (sums_of(SPECS, Weighing(changes=True, tallies=names)) for names in ((), NAMES, NAMES))
    fold_changes(full, bank, current, 7, list(range(CLIENTS)))
    for (*_, ours), (*_, theirs) in zip(copy.tensors(), full.tensors(), strict=True):
        ours.copy_(theirs)
    assert every(torch.equal(full.average(current, ratio)[s.name], copy.average(current, ratio)[s.name]) for s in SPECS)
    heads = 2 * EXPERTS + 2
    assert full.statistics.flat.memory.numel() == plain.statistics.flat.memory.numel() + 2 * 2 * heads
    assert full.statistics.windows.memory.numel() == plain.statistics.windows.memory.numel() + 2 * heads


def test_tallies_belong_to_changes() -> None:
    with pytest.raises(ValueError, match="changes"):
        Weighing(tallies=("steps",))


# Several weightings


def fold(sums: RoundSums, bank: Bank, order: list[int], seed: int = 7) -> None:
    """Every weighting has weights of its own."""
    for client in order:
        for spec in SPECS:
            weights = [numbers(seed + i, spec)[client] for i in range(len(sums.weightings))]
            sums.add(client, spec, bank.client(spec.name, client), weights)


def only(none: dict[str, np.ndarray]) -> float:
    raise AssertionError("a mean asks for no factor")


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("shares", [(1.0, 0.5), (0.2, 0.3, 0.5), (1.0, 0.0)])
def test_means_are_normalised_one_by_one_and_mixed(exact: bool, shares: tuple[float, ...]) -> None:
    bank, current = make_bank(CLIENTS, 0), make_bank(1, 1)
    sums = sums_of(SPECS, Weighing(shares=shares), exact)
    fold(sums, bank, list(range(CLIENTS)))
    found = sums.average(current, only)
    for spec in SPECS:
        for place in places(spec):
            mixed, whole = torch.zeros(spec.item, dtype=torch.float64), 0.0
            for i, share in enumerate(shares):
                weights = numbers(7 + i, spec)[(slice(None), *place)]
                if share and weights.sum():
                    values = [bank.client(spec.name, c)[place].double() for c in range(CLIENTS)]
                    mixed += share * sum(w * v for w, v in zip(weights / weights.sum(), values, strict=True))
                    whole += share
            expected = mixed / whole if whole else current.client(spec.name, 0)[place].double()
            assert torch.allclose(found[spec.name][place].double(), expected, atol=1e-6, rtol=0)
            assert bool(sums.trained(spec.name)[place]) == (whole > 0)


def test_a_share_of_zero_leaves_the_bits_of_the_other() -> None:
    bank, current = make_bank(CLIENTS, 0), make_bank(1, 1)
    both, alone = sums_of(SPECS, Weighing(shares=(0.7, 0.0))), sums_of(SPECS, Weighing())
    for sums in (both, alone):
        fold(sums, bank, list(range(CLIENTS)))
    assert every(torch.equal(both.average(current, only)[s.name], alone.average(current, only)[s.name]) for s in SPECS)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 1000))
def test_what_all_clients_agree_on_is_every_mean(seed: int, weight_seed: int) -> None:
    one = make_bank(1, seed)
    sums = sums_of(SPECS, Weighing(shares=(1.0, 0.3)))
    for client in range(CLIENTS):
        for spec in SPECS:
            weights = [np.maximum(numbers(weight_seed + i, spec)[client], 1e-6) for i in range(2)]
            sums.add(client, spec, one.client(spec.name, 0), weights)
    assert every(torch.equal(sums.average(make_bank(1, seed + 1), only)[s.name], one.client(s.name, 0)) for s in SPECS)


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(CLIENTS)))
def test_the_order_of_clients_does_not_matter_to_several_weightings(order: list[int]) -> None:
    bank = make_bank(CLIENTS, 0)
    one, other = (sums_of(SPECS, Weighing(shares=(1.0, 0.5))) for _ in range(2))
    fold(one, bank, list(range(CLIENTS)))
    fold(other, bank, order)
    ours, theirs = ({(spec.name, side): tensor for spec, side, _, tensor in sums.tensors()} for sums in (one, other))
    assert len(ours) == len(SPECS) * 2 * 4, "every sum and window has a name of its own in a checkpoint"
    assert every(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


@pytest.mark.parametrize("shares", [(), (0.0, 0.0), (1.0, -0.1), (1.0, float("nan"))])
def test_shares_are_those_of_a_mixture(shares: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="shares"):
        Weighing(shares=shares)


# Sums travel


class Alone:
    """A group of one rank."""

    size = 1

    def sum(self, tensor: Tensor) -> None: ...

    def largest(self, tensor: Tensor) -> None: ...


class Peer:
    """The collectives of a group of two, seen from one of them."""

    size = 2

    def __init__(self, other: Statistics) -> None:
        self.other = other

    def largest(self, tensor: Tensor) -> None:
        torch.maximum(tensor, self.other.windows.memory, out=tensor)
        agreed = self.other._empty_windows()
        agreed.memory.copy_(tensor)
        for name, windows in agreed.parts.items():
            for part, own in zip(self.other._sums(name), windows, strict=True):
                part.raise_to(own[0])

    def sum(self, tensor: Tensor) -> None:
        tensor += self.other.flat.memory


@pytest.mark.parametrize("large", [1.0, 2.0**60])
def test_two_ranks_add_up_to_one(large: float) -> None:
    """Also where the clients of one of them have numbers that need another window, in weights and in tallies."""
    bank, current, weighing = make_bank(CLIENTS, 0), make_bank(1, 1), Weighing(changes=True, tallies=NAMES)
    one, other, both = (sums_of(SPECS, weighing) for _ in range(3))
    for client in range(CLIENTS):
        for spec in SPECS:
            change = bank.client(spec.name, client) - current.client(spec.name, 0)
            times = large if client == 3 else 1.0
            weights, steps, share = (times * numbers(7 + i, spec)[client] for i in range(3))
            for sums in (both, other if client % 2 else one):
                sums.add(client, spec, change, [weights], {"steps": steps, "share": share})
    one.statistics.reduce(Alone(), Peer(other.statistics))
    for ours, theirs in zip(one.tensors(), both.tensors(), strict=True):
        assert torch.equal(ours[3], theirs[3]), ours[1]


# Elements


def elements(seed: int, spec: BlockSpec, client: int) -> Tensor:
    """Weights of a block's elements, over three orders of magnitude: terms of the usual sizes (`exact_sum.py`)."""
    draw = torch.Generator().manual_seed(100 * seed + client)
    shape = (2, *((EXPERTS,) if spec.expert else ()), *spec.item)
    return torch.exp(3.5 * (2 * torch.rand(shape, generator=draw) - 1))


def fold_elements(sums: RoundSums, bank: Bank, order: list[int], seed: int = 7) -> None:
    for client in order:
        for spec in SPECS:
            weight, own = numbers(seed, spec)[client], elements(seed, spec, client)
            sums.add(client, spec, bank.client(spec.name, client), [weight], elements=own)


@pytest.mark.parametrize("exact", [True, False])
def test_every_element_has_a_mean_of_its_own(exact: bool) -> None:
    bank, current = make_bank(CLIENTS, 0), make_bank(1, 1)
    sums = sums_of(SPECS, Weighing(elements=True), exact)
    fold_elements(sums, bank, list(range(CLIENTS)))
    found = sums.average(current, only)
    for spec in SPECS:
        for place in places(spec):
            weights = [numbers(7, spec)[(c, *place)] * elements(7, spec, c)[place].double() for c in range(CLIENTS)]
            whole = sum(weights, torch.zeros(spec.item, dtype=torch.float64))
            mean = sum(w * bank.client(spec.name, c)[place].double() for c, w in enumerate(weights)) / whole
            some = bool(numbers(7, spec)[(slice(None), *place)].any())
            expected = mean if some else current.client(spec.name, 0)[place].double()
            assert torch.allclose(found[spec.name][place].double(), expected, atol=1e-6 if exact else 1e-4, rtol=0)
            assert bool(sums.trained(spec.name)[place]) == some


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(CLIENTS)), st.integers(0, 1000))
def test_the_order_of_clients_does_not_matter_to_elements(order: list[int], seed: int) -> None:
    bank = make_bank(CLIENTS, seed)
    one, other = (sums_of(SPECS, Weighing(elements=True)) for _ in range(2))
    fold_elements(one, bank, list(range(CLIENTS)), seed)
    fold_elements(other, bank, order, seed)
    assert every(torch.equal(ours[3], theirs[3]) for ours, theirs in zip(one.tensors(), other.tensors(), strict=True))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000))
def test_one_client_is_its_own_mean_whatever_its_elements_weigh(seed: int) -> None:
    """A product of two float32 is exact in float64, so dividing by the weight gives the value back."""
    bank = make_bank(CLIENTS, seed)
    sums = sums_of(SPECS, Weighing(elements=True))
    for spec in SPECS:
        whole = np.full((2, EXPERTS) if spec.expert else (2,), 1.0)
        sums.add(0, spec, bank.client(spec.name, 2), [whole], elements=elements(seed, spec, 0))
    found = sums.average(make_bank(1, seed + 1), only)
    assert every(torch.equal(found[spec.name], bank.client(spec.name, 2)) for spec in SPECS)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000))
def test_a_mean_of_elements_lies_between_the_clients(seed: int) -> None:
    bank = make_bank(CLIENTS, seed)
    sums = sums_of(SPECS, Weighing(elements=True))
    fold_elements(sums, bank, list(range(CLIENTS)), seed)
    found = sums.average(make_bank(1, seed + 1), only)
    for spec in SPECS:
        for place in places(spec):
            taking = [c for c in range(CLIENTS) if numbers(seed, spec)[(c, *place)]]
            if taking:
                values = torch.stack([bank.client(spec.name, c)[place] for c in taking])
                assert bool(
                    (found[spec.name][place] >= values.amin(0)).all() & (found[spec.name][place] <= values.amax(0)).all()
                )


def test_elements_that_weigh_the_same_leave_the_bits_of_the_mean() -> None:
    bank, current = make_bank(CLIENTS, 0), make_bank(1, 1)
    own, plain = sums_of(SPECS, Weighing(elements=True)), sums_of(SPECS, Weighing())
    for client in range(CLIENTS):
        for spec in SPECS:
            value, weight = bank.client(spec.name, client), [numbers(7, spec)[client]]
            own.add(client, spec, value, weight, elements=torch.ones_like(value))
            plain.add(client, spec, value, weight)
    ours, theirs = own.average(current, only), plain.average(current, only)
    assert every(torch.equal(ours[spec.name], theirs[spec.name]) for spec in SPECS)
    numbers_of_a_client = sum(bank.client(spec.name, 0).numel() for spec in SPECS)
    assert own.statistics.flat.memory.numel() == 2 * 2 * numbers_of_a_client, "two sums, as large as the blocks"


def test_kinds_of_weights_are_not_mixed() -> None:
    for kinds in ({"changes": True, "shares": (1.0, 1.0)}, {"changes": True, "elements": True}):
        with pytest.raises(ValueError, match="one of them"):
            Weighing(**kinds)  # type: ignore[arg-type]
