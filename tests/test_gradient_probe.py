"""Gradient probes: the numbers of plain loops, a client's own to the bit, paid for, and nothing else changes.

Legend: L layers, E experts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from every import every
from federations import alone, build, make_config, write_inputs
from numpy.typing import NDArray
from reference import Reference, Settings
from reference_inputs import initial

from fedmoe_ds.clients.assignment import FIRST_STEP, Assignment
from fedmoe_ds.clients.client import Client
from fedmoe_ds.clients.hooks import LocalTrainingHooks
from fedmoe_ds.clients.pass_limits import PassLimits
from fedmoe_ds.clients.update import ClientUpdate
from fedmoe_ds.federation.build import Parts
from fedmoe_ds.federation.rounds import Federation
from fedmoe_ds.federation.schedule import schedule
from fedmoe_ds.model.pass_context import RoutingObserver
from fedmoe_ds.testing import check_method

sys.path.append(str(Path(__file__).parent / "third_party"))
Squares = Mapping[str, NDArray[np.float64]]
Probe = Callable[[Client], tuple[NDArray[np.int64], ...] | None]
BASE: dict[str, Any] = {
    "method": {"name": "fedit"},
    "adapters": {"router": "train", "dropout": 0.2},
    "local": {"max_steps": 2, "weight_decay": 0.1},
    "execution": {"micro_batch_size": None},
    "evaluation": {"max_sequences": 1, "client_sequences": 0},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probe")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def parts(root: Path) -> Parts:
    """After a round: before it B is zero, and no A has a gradient."""
    found, journal = build(make_config(root, "probe", BASE), *alone())
    assert not Federation(found, journal)._round(1)
    journal.close()
    return found


def flat(squares: Squares) -> NDArray[np.float64]:
    """All numbers, in the order of the blocks."""
    return np.concatenate([square.ravel() for square in squares.values()])


def trained(
    parts: Parts, probe: Probe, in_flight: int | None = None, limits: PassLimits | None = None, **hooks: Any
) -> tuple[list[dict[str, torch.Tensor]], list[ClientUpdate]]:
    """Every client's blocks and report after a second round, in canonical order."""

    def assign(client: Client, round_index: int) -> Assignment:
        return Assignment(client.cap, probe=probe(client))

    parts.trainer.hooks = LocalTrainingHooks(**{"assign": assign, "reduce_probe": flat, **hooks})
    (waves,) = schedule(parts.clients, parts.spec.cost, parts.config.local, 1, 1, in_flight)
    given = (2, parts.state.adapters, parts.state.personal.state, parts.data.train)
    found = {}
    for wave in waves:
        for view, update in parts.trainer.train(wave, *given, limits or PassLimits()):
            found[update.client.index] = {spec.name: view.value(spec).clone() for spec in view.blocks()}, update
    values, updates = zip(*(found[index] for index in sorted(found)), strict=True)
    return list(values), list(updates)


def nothing(client: Client) -> None:
    return None


def one_by_one(client: Client) -> tuple[NDArray[np.int64], ...]:
    """Unequal numbers of samples, each in a pass of its own; the last client has none."""
    return tuple(np.arange(min(client.sequences, 4 - client.index))[:, None]) if client.index < 4 else FIRST_STEP


def in_pairs(client: Client) -> tuple[NDArray[np.int64], ...]:
    return np.arange(2), np.arange(1, min(4, client.sequences))


def numbers(updates: Sequence[ClientUpdate]) -> list[NDArray[np.float64] | None]:
    return [None if update.probed is None else update.probed.numbers for update in updates]


def same(ours: Sequence[NDArray[np.float64] | None], theirs: Sequence[NDArray[np.float64] | None]) -> bool:
    """To the bit."""
    return len(ours) == len(theirs) and all(
        (a is None) == (b is None) and (a is None or (a.shape == b.shape and a.tobytes() == b.tobytes()))  # type: ignore[union-attr]
        for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("probe", [one_by_one, in_pairs])
def test_the_numbers_are_those_of_plain_loops(root: Path, parts: Parts, probe: Probe) -> None:
    """One sample after the other in float64, and torch's gradients: a mean over the targets of a pass, without dropout."""
    _, updates = trained(parts, probe)
    reference, start, compared = Reference(root / "model", Settings(scale=2.0)), initial(parts), 0
    for update in updates:
        passes = probe(update.client) or ()
        if not passes:
            continue
        assert update.probed is not None and len(update.probed.numbers) == len(passes)
        data, counts, tokens = parts.data.train(update.client.index), np.zeros(parts.counts_shape), 0
        for chosen, found in zip(passes, update.probed.numbers, strict=True):
            adapters = {key: value.clone().requires_grad_() for key, value in start.items()}
            run = reference.start(adapters, torch.ones(1, dtype=torch.float64), update.client.cap)
            losses = [reference.loss_sum(data.input_ids[i], data.loss_mask[i]) for i in chosen]
            (torch.stack(losses).sum() / sum(int(data.loss_mask[i].sum()) for i in chosen)).backward()
            np.testing.assert_allclose(found, flat(squares_of(parts, adapters)), rtol=1e-4, atol=1e-9)
            counts, tokens, compared = counts + run.counts, tokens + sum(len(data.input_ids[i]) for i in chosen), compared + 1
        assert np.array_equal(update.probed.counts_LE, counts) and update.probed.tokens == tokens
    assert compared >= 10 and reference.margin > 1e-6


def squares_of(parts: Parts, adapters: Mapping[str, torch.Tensor]) -> dict[str, NDArray[np.float64]]:
    found = {}
    for spec in parts.execution.bank.specs.values():
        experts = range(parts.counts_shape[1]) if spec.expert else [None]
        keys = [[spec.key(layer, expert) for expert in experts] for layer in spec.layers]
        grads = [[adapters[key].grad for key in row] for row in keys]
        square = np.array([[0.0 if grad is None else float(grad.square().sum()) for grad in row] for row in grads])
        found[spec.name] = square if spec.expert else square[:, 0]
    assert all(square.any() for square in found.values()), "every block has a gradient"
    return found


def test_they_are_the_client_s_own_to_the_bit(parts: Parts) -> None:
    """Whoever shares its wave, and whatever these look at."""
    _, together = trained(parts, one_by_one)
    for in_flight in (1, 2):
        assert same(numbers(trained(parts, one_by_one, in_flight)[1]), numbers(together))
    _, other = trained(parts, lambda client: one_by_one(client) if client.index == 1 else in_pairs(client))
    assert same(numbers(other)[1:2], numbers(together)[1:2])
    assert not same(numbers(other), numbers(together))


def test_a_probe_changes_nothing_else(parts: Parts) -> None:
    """Neither adapters nor reports, with dropout, clipping and decay; of a method that observes, minimises and holds back."""

    def observe(routing: Any, valid_T: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return routing.counts_E() % 2 == 0, {"seen": routing.probs_TE.double().sum(0)}

    methods: list[dict[str, Any]] = [
        {},
        {"observer": lambda client, assignment: RoutingObserver(observe), "observes": ("seen",), "selective": True},
    ]
    for hooks in methods:
        plain, before = trained(parts, nothing, **hooks)
        probed, after = trained(parts, one_by_one, **hooks)
        assert every(torch.equal(a[name], b[name]) for a, b in zip(plain, probed, strict=True) for name in a)
        for ours, theirs in zip(before, after, strict=True):
            assert np.array_equal(ours.counts_LE, theirs.counts_LE) and np.array_equal(ours.trained_LE, theirs.trained_LE)
            assert (ours.tokens, ours.targets, ours.losses) == (theirs.tokens, theirs.targets, theirs.losses)
            assert all(np.array_equal(ours.observed[name], theirs.observed[name]) for name in ours.observed)
            assert ours.probed is None and theirs.probed is not None
    # What is held back in training is looked at all the same.
    assert same(numbers(after), numbers(trained(parts, one_by_one)[1])[:4] + numbers(after)[4:])


def test_the_light_form_takes_the_first_step_s_gradient(root: Path) -> None:
    """Without dropout it is that of a pass over the first step's samples; a later step has another."""
    config = make_config(root, "light", BASE, {"adapters": {"dropout": 0.0}})
    parts, journal = build(config, *alone())
    journal.close()
    batches = {}

    def first_step(client: Client, round_index: int) -> list[NDArray[np.int64]]:
        batches[client.index] = [np.arange(3), np.arange(2)]
        return batches[client.index]

    _, light = trained(parts, lambda client: FIRST_STEP, batches=first_step)
    _, own = trained(parts, lambda client: (np.arange(3),), batches=first_step)
    assert same(numbers(light), numbers(own)) and every(update.probed.tokens == 0 for update in light if update.probed)
    trained_LE = np.arange(parts.counts_shape[1])[None].repeat(parts.counts_shape[0], 0) % 2 == 0
    told = Assignment(1, trained_LE=trained_LE, probe=FIRST_STEP)
    _, held = trained(
        parts, nothing, assign=lambda client, _: replace(told, cap=client.cap), batches=first_step, reduce_probe=of_experts
    )
    for update in held:
        assert update.probed is not None
        (square_LE,) = update.probed.numbers
        assert not square_LE[~trained_LE].any() and square_LE[trained_LE].any()


def test_the_light_form_is_the_client_s_own_where_it_trains_some_layers(parts: Parts) -> None:
    """Passes go back to the first layer that anyone in them trains."""

    def assign(client: Client, round_index: int) -> Assignment:
        last = np.arange(parts.spec.size.depth) > 0
        return Assignment(client.cap, trained_N=last if client.index % 2 else None, probe=FIRST_STEP)

    _, together = trained(parts, nothing, assign=assign, reduce_probe=of_experts)
    for update in together:
        assert update.probed is not None
        (square_LE,) = update.probed.numbers
        assert square_LE[1:].any() and bool(square_LE[0].any()) == (update.client.index % 2 == 0)
    assert same(numbers(trained(parts, nothing, 1, assign=assign, reduce_probe=of_experts)[1]), numbers(together))


def of_experts(squares: Squares) -> NDArray[np.float64]:
    """[L, E]."""
    return np.sum([square for square in squares.values() if square.ndim == 2], axis=0)


def test_smaller_passes_are_the_same_mathematics(parts: Parts) -> None:
    _, whole = trained(parts, in_pairs)
    _, cut = trained(parts, in_pairs, limits=PassLimits(each=1))
    for ours, theirs in zip(numbers(whole), numbers(cut), strict=True):
        assert ours is not None and theirs is not None
        np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-12)


def test_a_probe_is_paid_for(parts: Parts) -> None:
    """Forward and backward passes of its rows, predicted by their number; rollouts are forward passes alone."""
    cost, layers, rank = parts.spec.cost, parts.spec.expert_layout.layers, parts.config.adapters.rank
    (_, plain), (_, probed) = trained(parts, nothing), trained(parts, in_pairs)
    for ours, theirs in zip(plain, probed, strict=True):
        assert theirs.probed is not None
        more = cost.counted(theirs, rank, layers) - cost.counted(ours, rank, layers)
        rows = int(theirs.probed.counts_LE.sum())
        assert more == pytest.approx(cost.spent(theirs.probed.tokens, rows, rows, rank))
    client, local = parts.clients[0], parts.config.local
    base, looked = cost.client(client, local), cost.client(replace(client, probed=client.sequences), local)
    epoch = cost.client(replace(client, steps=1), local.model_copy(update={"batch_size": client.sequences}))
    assert looked - base == pytest.approx(epoch)
    # Each model of an ensemble is looked at.
    several, pair = replace(cost, ensembles=True), replace(client, experts=3)
    probing = several.client(replace(pair, probed=client.sequences), local) - several.client(pair, local)
    assert probing == pytest.approx(3 * epoch)
    rolled = cost.client(replace(client, rollouts=3), local)
    tokens = 2 * local.batch_size * client.token_rows / client.sequences
    assert rolled - base == pytest.approx(3 * tokens * cost.forward(client.cap, client.rank))
    half = cost.client(replace(client, used=2), local)
    assert half == pytest.approx(cost.client(replace(client, steps=1), local.model_copy(update={"batch_size": 2})))


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.sweep)])
@pytest.mark.parametrize("passes", [2, 0])
def test_a_method_that_weighs_by_its_numbers(passes: int, ranks: int, tmp_path: Path) -> None:
    """Every bit of them is in the result: it is the same on all ranks, in all waves and after a stop."""
    import probing

    short = {"evaluation": {"max_sequences": 1, "client_sequences": 0}, "local": {"max_steps": 1}}
    result = check_method(probing.Probing, {"passes": passes}, short, ranks=ranks, folder=tmp_path)
    rows = result.metrics("client")
    assert every(row.get("probe_tokens", 0) > 0 for row in rows) if passes else not any("probe_tokens" in row for row in rows)
