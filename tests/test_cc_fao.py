"""CC-FAO: its limits in closed form, its draws, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from every import every
from federations import alone, build, make_config, write_inputs
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_ds.clients.client import Client
from fedmoe_ds.clients.client_view import ClientView
from fedmoe_ds.config import Config, MethodConfig
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation.rounds import Federation
from fedmoe_ds.methods import Method, ModelFacts, PlanContext, RoundContext, load_method, method_for
from fedmoe_ds.methods.cc_fao import CCFAO

RATE, ETA, STEPS = 0.5, 0.125, 2
SMALL: dict[str, Any] = {
    "federation": {"tiers": [{"top_k": 4, "share": 1.0}]},
    "local": {"batch_size": 2, "optimizer": "sgd", "lr": RATE, "max_steps": None, "clip": None},
    "execution": {"micro_batch_size": None},
    "evaluation": {"max_sequences": 1, "client_sequences": 0, "every": 9},
}
EQUAL = {"name": "cc-fao", "amsgrad": False, "pace": "equal", "steps": STEPS, "max_delay": 0}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cc-fao")
    write_inputs(folder, (13, 9, 7, 5), num_hidden_layers=1, num_experts=8, num_experts_per_tok=4, hidden_size=16)
    return folder


def config_of(root: Path, tag: str, method: dict[str, Any], *changes: dict[str, Any]) -> Config:
    return make_config(root, tag, SMALL, {"method": method}, *changes)


def rounds(config: Config, count: int) -> list[dict[str, torch.Tensor]]:
    """The global adapters before the first round and after each."""
    parts, journal = build(config, *alone())
    federation, found = Federation(parts, journal), []
    for round_index in range(count + 1):
        if round_index:
            assert not federation._round(round_index)
        found.append({key: value.clone() for key, _, value in parts.state.adapters.items(0)})
    journal.close()
    return found


def test_without_moments_delays_and_unequal_steps_it_is_fedavg_with_equal_weights(root: Path) -> None:
    """Of the rate eta / (eta_l K); FSLoRA of full rank weighs clients alike."""
    ours = rounds(config_of(root, "ours", EQUAL, {"server": {"lr": ETA}}), 2)[-1]
    fedavg = {"local": {"steps": STEPS}, "server": {"lr": ETA / (RATE * STEPS)}}
    begun, _, theirs = rounds(config_of(root, "theirs", {"name": "fslora"}, {"federation": {"budget": "top_k"}}, fedavg), 2)
    for key, value in ours.items():
        assert float((value - theirs[key]).abs().max()) < 1e-6, key
    assert any(float((value - begun[key]).abs().max()) > 1e-4 for key, value in ours.items()), "something was learnt"


def test_on_a_linear_loss_neither_delays_nor_steps_change_anything(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every gradient is 1/4: x_t = x_0 - t eta / 4, whoever takes how many steps from where."""

    def adjust(self: Method, view: ClientView) -> None:
        for spec in view.blocks():
            view.grad(spec).fill_(0.25)

    monkeypatch.setattr(CCFAO, "adjust", adjust, raising=False)
    drawn = {"name": "cc-fao", "amsgrad": False, "scaled_rate": False, "steps": 3, "max_delay": 3}
    found = rounds(config_of(root, "linear", drawn, {"server": {"lr": ETA}}), 4)
    for round_index, adapters in enumerate(found):
        wanted = {key: value - round_index * ETA * 0.25 for key, value in found[0].items()}
        assert every(float((value - wanted[key]).abs().max()) < 1e-6 for key, value in adapters.items()), round_index


def method_of(seed: int, **params: Any) -> CCFAO:
    method = load_method(MethodConfig(name="cc-fao", **params))
    assert isinstance(method, CCFAO)
    method.facts = ModelFacts(4, 8, 4, seed)
    return method


def clients_of(count: int) -> list[Client]:
    return [Client(i, f"client-{i}", 4, 5, 5, 50, cap=4) for i in range(count)]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(0, 5), st.integers(0, 6), st.integers(1, 9))
def test_draws_and_rate(seed: int, steps: int, most: int, threshold: int, round_index: int) -> None:
    keys = {"delay_threshold": threshold} if most > 1 else {}
    method, clients = method_of(seed, steps=steps, max_delay=most, **keys), clients_of(9)
    plan = method.plan(PlanContext(round_index, clients, clients, {}))
    assert [client.index for client in plan.participants] == list(range(9))
    assert every(1 <= client.steps <= 2 * steps for client in plan.participants if client.steps is not None)
    delays = [method.assign(client, RoundContext(round_index, {})).delay for client in clients]
    assert every(delay is not None and 0 <= delay <= min(most, round_index - 1) for delay in delays)
    # Each client's own, whoever else there is.
    assert method.plan(PlanContext(round_index, clients[3:5], clients, {})).participants == plan.participants[3:5]
    latest = max(delay or 0 for delay in delays)
    expected = 1.0 if latest <= keys.get("delay_threshold", 1) else min(1.0, 1.0 / latest)
    assert method.server_rate(round_index, clients) == expected
    assert method.assign(clients[0], RoundContext(0, {})).delay is None, "a tier is evaluated with the present adapters"


def test_clients_differ() -> None:
    method, clients = method_of(0, steps=2, max_delay=2), clients_of(40)
    plan = method.plan(PlanContext(9, clients, clients, {}))
    assert {client.steps for client in plan.participants} == {1, 2, 3, 4}
    assert {method.assign(client, RoundContext(9, {})).delay for client in clients} == {0, 1, 2}
    assert method.server_rate(9, clients) == 0.5 and method.server_rate(9, []) == 1.0
    assert method_of(0, scaled_rate=False).server_rate(9, clients) == 1.0


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "adamw": (
        {"local": {"optimizer": "adamw"}},
        "local.optimizer: adamw: CC-FAO divides a client's change by eta K, which gives a gradient after plain steps only; use "
        "local.optimizer=sgd and local.momentum=0",
    ),
    "momentum": ({"local": {"momentum": 0.5}}, "local.momentum: 0.5: CC-FAO divides a client's change by eta K"),
    "steps": ({"local": {"steps": 3}}, "local.steps: 3: CC-FAO draws every client's steps around method.steps; drop the key"),
    "epochs": ({"local": {"epochs": 2.0}}, "local.epochs: 2.0: CC-FAO draws every client's steps around method.steps"),
    "fedavg": ({}, "method.amsgrad: true: CC-FAO's server is AMSGrad, and server.optimizer is fedavg; use"),
    "scaffold": (
        {"local": {"drift": "scaffold"}, "server": {"optimizer": "fedams"}},
        "local.drift: scaffold: method.name=cc-fao lets clients start from adapters of past rounds",
    ),
    "equal pace": (
        {"method": {"pace": "equal", "normalise": False}, "server": {"optimizer": "fedams"}},
        "method.normalise: False: has no effect with method.pace=equal; drop the key",
    ),
    "no delays": (
        {"method": {"max_delay": 1, "delay_threshold": 2}, "server": {"optimizer": "fedams"}},
        "method.delay_threshold: 2: has no effect with method.max_delay below 2; drop the key",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(root: Path, case: str) -> None:
    change, message = REFUSED[case]
    with pytest.raises(UserError) as caught:
        method_for(config_of(root, "refused", {"name": "cc-fao"}, change))
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value) and "; " in str(caught.value)
