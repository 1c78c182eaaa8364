"""Late clients: the ring of past adapters, what a client that starts from it trains and contributes, and who is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from every import every
from federations import alone, build, make_config, write_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_inputs import check_equal, initial, tasks
from reference_methods import FedIT, FedProx, Late
from replay import Replay

from fedmoe_ds.aggregation.past_adapters import PastAdapters
from fedmoe_ds.clients.client import Client
from fedmoe_ds.clients.client_view import ClientView
from fedmoe_ds.config import Config
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation.rounds import Federation
from fedmoe_ds.methods import Assignment, Method, RoundContext, method_for
from fedmoe_ds.methods import fedit as plain
from fedmoe_ds.model.adapter_bank import Bank, BlockSpec, shared_blocks
from fedmoe_ds.planner.memory import outlasting
from fedmoe_ds.planner.workload import resolve

SPECS = [BlockSpec("experts.down.lora_A", (0, 1), (2, 3), expert=True), BlockSpec("attention.q_proj.lora_B", (0,), (4,))]
MODEL: dict[str, Any] = {"num_hidden_layers": 1, "num_experts": 8, "num_experts_per_tok": 4, "hidden_size": 16}
LR, CLIP, MU, MOST = 0.5, 0.5, 0.3, 2
SMALL: dict[str, Any] = {
    "method": {"name": "fedit"},
    "federation": {"participation": 0.75, "rounds": 9, "tiers": [{"top_k": 4, "share": 1.0}]},
    "local": {"max_steps": 2, "batch_size": 2, "optimizer": "sgd", "lr": LR, "clip": CLIP},
    "execution": {"micro_batch_size": None, "clients_in_flight": 4},
    "evaluation": {"max_sequences": 1, "client_sequences": 0, "every": 9},
    "checkpoint": {"every": 9},
}


def delay_of(index: int, round_index: int) -> int:
    """Clients of one wave are late by different numbers of rounds."""
    return (index + round_index) % (MOST + 1)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """FedIT, whose clients are late."""

    def assign(self: Method, client: Client, context: RoundContext) -> Assignment:
        return Assignment(client.cap, delay=delay_of(client.index, context.round))

    monkeypatch.setattr(plain.FedIT, "assign", assign, raising=False)
    monkeypatch.setattr(plain.FedIT, "most_delay", MOST)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("late")
    write_inputs(folder, (13, 9, 7, 5), **MODEL)
    return folder


def config_of(root: Path, tag: str, *changes: dict[str, Any]) -> Config:
    return make_config(root, tag, SMALL, *changes)


@settings(max_examples=40, deadline=None)
@given(most=st.integers(1, 5), rounds=st.integers(1, 12))
def test_the_ring_has_the_adapters_of_every_past_round(most: int, rounds: int) -> None:
    ring, adapters = PastAdapters(most), Bank(SPECS, 3, clients=1, with_grad=False)
    banks = ring.banks(SPECS, 3)
    assert len(banks) == most, "with the present ones, most + 1 adapters"
    for name in adapters.specs:
        adapters.values[name].fill_(-1.0)
    ring.begin(adapters, banks)
    for round_index in range(1, rounds + 1):
        for delay in range(1, most + 1):
            found, done = ring.of(delay, round_index, banks), round_index - 1 - delay
            assert found is not None
            # Rounds before the first: the initial adapters.
            wanted = float(done) if done > 0 else -1.0
            assert every(bool((value == wanted).all()) for value in found.values.values()), (round_index, delay)
        assert ring.of(None, round_index, banks) is ring.of(0, round_index, banks) is None
        ring.keep({name: adapters.client(name, 0) for name in adapters.specs}, round_index, banks)
        for name in adapters.specs:
            adapters.values[name].fill_(float(round_index))
    for delay in (-1, most + 1):
        with pytest.raises(UserError, match=rf"^method.name: .* {delay} rounds ago, and the run keeps those of {most}; set"):
            ring.of(delay, rounds, banks)


@pytest.mark.parametrize("drift", ["none", "fedprox"])
@pytest.mark.usefixtures("late")
def test_late_clients_are_the_plain_rounds(root: Path, drift: str) -> None:
    """FedProx pulls towards what the client really started from."""
    local = {"local": {"drift": drift, **({"proximal": MU} if drift == "fedprox" else {})}}
    parts, journal = build(config_of(root, f"plain-{drift}", local), *alone())
    bases = (FedProx, Late) if drift == "fedprox" else (Late,)
    kind: type[FedIT] = type("Expected", bases, {})
    replay: Any = Replay(parts, LR, CLIP)
    expected = kind(replay, initial(parts), [c.index for c in parts.clients], delay=delay_of, mu=MU)
    federation, met = Federation(parts, journal), set[int]()
    for round_index in range(1, 6):
        replay.forget()
        assert not federation._round(round_index)
        met |= {delay_of(index, round_index) for index in replay.updates}
        expected.round(tasks(parts, round_index), {})
        check_equal(dict(expected.adapters), {key: value.double() for key, _, value in parts.state.adapters.items(0)})
    journal.close()
    assert met == {0, 1, 2}


def test_clients_that_could_be_late_and_are_not_change_no_bit(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def digest(tag: str) -> str:
        parts, journal = build(config_of(root, tag, {"federation": {"rounds": 2}}), *alone())
        found = Federation(parts, journal).run().digest
        journal.close()
        return found

    usual = digest("usual")
    monkeypatch.setattr(plain.FedIT, "most_delay", MOST)
    monkeypatch.setattr(plain.FedIT, "assign", lambda self, client, context: Assignment(client.cap, delay=0), raising=False)
    assert digest("punctual") == usual


@pytest.mark.parametrize("delay", [0, 1, 3])
def test_a_delay_is_no_shift_of_the_synchronous_run(root: Path, monkeypatch: pytest.MonkeyPatch, delay: int) -> None:
    """One client, f = |x|^2 / 2, one step: x_{t+1} = x_t - eta x_{t-tau}; with a rate of 1/2 there is nothing to round."""

    def adjust(self: Method, view: ClientView) -> None:
        for spec in view.blocks():
            view.grad(spec).copy_(view.value(spec))

    monkeypatch.setattr(plain.FedIT, "most_delay", delay)
    monkeypatch.setattr(plain.FedIT, "assign", lambda self, client, context: Assignment(4, delay=delay), raising=False)
    monkeypatch.setattr(plain.FedIT, "adjust", adjust, raising=False)
    change = {"federation": {"participation": 0.1}, "local": {"steps": 1, "max_steps": None, "clip": None}}
    parts, journal = build(config_of(root, f"quadratic-{delay}", change), *alone())
    adapters, federation = parts.state.adapters, Federation(parts, journal)
    history = [{key: value.clone() for key, _, value in adapters.items(0)}]
    for round_index in range(1, 7):
        assert not federation._round(round_index)
        past = history[max(round_index - 1 - delay, 0)]
        wanted = {key: (value.double() - LR * past[key].double()).float() for key, value in history[-1].items()}
        found = {key: value.clone() for key, _, value in adapters.items(0)}
        assert not [key for key, value in found.items() if not torch.equal(value, wanted[key])], round_index
        history.append(found)
    journal.close()


@pytest.mark.usefixtures("late")
def test_the_ring_is_counted(root: Path) -> None:
    config = config_of(root, "counted")
    parts, journal = build(config, *alone())
    journal.close()
    job = resolve(config, assume=False)
    ring = sum(bank.nbytes() for name, bank in parts.state.server.items() if name.startswith("past"))
    shared = sum(parts.state.adapters.values[spec.name].nbytes for spec in shared_blocks(job.blocks))
    assert ring == MOST * shared == outlasting(job, 4, 3)["server state"] > 0


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "scaffold": (
        {"local": {"drift": "scaffold"}},
        "local.drift: scaffold: method.name=fedit lets clients start from adapters of past rounds, and the server's control "
        "variate of those rounds is not kept; use none or fedprox",
    ),
    "no mean": (
        {"method": {"name": "flora"}},
        "method.name: flora: clients start from adapters of past rounds, and method flora has no mean that their change could "
        "go into; use a method that averages adapters",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.usefixtures("late")
def test_refusals(root: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    change, message = REFUSED[case]
    config = config_of(root, "refused", change)
    monkeypatch.setattr(Method, "most_delay", MOST)
    with pytest.raises(UserError) as caught:
        method_for(config)
    assert str(caught.value) == message
