"""No client's data reach another client's parameters; a client whose update is not finite is left out, named and counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from every import every
from federations import Result, alone, build, finish, make_config, own_values, run_alone, write_inputs
from torch import Tensor

from fedmoe_ds.clients.client import Client
from fedmoe_ds.data import Sequences
from fedmoe_ds.federation import run_spec
from fedmoe_ds.federation.build import Parts
from fedmoe_ds.federation.schedule import schedule

UNUSED_TOKEN = 319
ROUND = {"federation": {"rounds": 1}, "evaluation": {"client_sequences": 0}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("isolation")
    write_inputs(folder)
    return folder


def train_together(parts: Parts, read: Callable[[int], Sequences]) -> dict[int, dict[str, Tensor]]:
    """One wave with every client; what each of them ends with, personal state included."""
    ((wave,),) = schedule(parts.clients, parts.spec.cost, parts.config.local, 1, 1, None)
    trained = parts.trainer.train(wave, 1, parts.state.adapters, parts.state.personal.state, read)
    return {
        local.client.index: {spec.name: local.value(spec).clone() for spec in local.blocks(trained=False)}
        for local, _ in trained
    }


def garbled(data: Sequences) -> Sequences:
    """Other tokens, other lengths, other targets; as many sequences."""
    draw = np.random.default_rng(0)
    ids = [draw.integers(2, 300, size=int(draw.integers(2, 40))) for _ in data.input_ids]
    return Sequences(ids, [np.arange(len(seq)) > 0 for seq in ids])


@pytest.mark.parametrize("mode", ["bitwise", "fast"])
def test_one_clients_data_change_nobody_else(root: Path, mode: str) -> None:
    change: dict[str, Any] = {"execution": {"reproducible": mode}, "adapters": {"router": "train"}, "local": {"z_loss": 0.01}}
    parts, journal = build(make_config(root, f"isolation-{mode}", ROUND, change), *alone())
    journal.close()
    victim = 2
    before = train_together(parts, parts.data.train)
    again = train_together(parts, parts.data.train)
    after = train_together(parts, lambda i: garbled(parts.data.train(i)) if i == victim else parts.data.train(i))
    for index, adapters in before.items():
        for name, value in adapters.items():
            assert torch.equal(value, again[index][name]), "training twice is the same"
            if index == victim:
                assert not torch.equal(value, after[index][name]), name
            elif mode == "bitwise":
                assert torch.equal(value, after[index][name]), (index, name)
            else:
                assert float((value - after[index][name]).norm() / value.norm()) <= 1e-5, (index, name)


class Poisoned:
    """The run's data, with a token in front of one client's sequences whose embedding is not a number."""

    def __init__(self, parts: Parts, victim: int) -> None:
        self.data, self.victim = parts.data, victim
        model: Any = parts.foundation.model
        model.get_input_embeddings().weight[UNUSED_TOKEN] = float("nan")
        assert not any(UNUSED_TOKEN in ids for c in parts.clients for ids in self.data.train(c.index).input_ids)

    def train(self, client: int) -> Sequences:
        data = self.data.train(client)
        if client != self.victim:
            return data
        return replace(data, input_ids=[np.concatenate([[UNUSED_TOKEN], ids[1:]]) for ids in data.input_ids])


def run_without(root: Path, monkeypatch: pytest.MonkeyPatch, absent: int) -> Result:
    """The same run, in which one client was never drawn."""
    original = run_spec.participants

    def others(clients: list[Client], *rest: Any) -> list[Client]:
        return [client for client in original(clients, *rest) if client.index != absent]

    with monkeypatch.context() as patch:
        patch.setattr(run_spec, "participants", others)
        return run_alone(make_config(root, f"without-{absent}", ROUND))


@pytest.mark.parametrize("mode", ["bitwise", "fast"])
def test_a_client_that_is_not_finite_is_left_out(root: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    victim = 4
    parts, journal = build(make_config(root, f"poisoned-{mode}", ROUND, {"execution": {"reproducible": mode}}), *alone())
    parts.training_data = Poisoned(parts, victim)
    name = parts.clients[victim].name
    kept = {block: values[victim].clone() for block, values in own_values(parts).items()}
    result = finish(parts, journal)
    (event,) = [event for event in result.events if event["event"] == "round"]
    assert (event["participants"], event["dropped"], event["dropped_clients"]) == (6, 1, [name])
    statuses = {event["client"]: event["status"] for event in result.events if event["event"] == "client"}
    assert statuses.pop(name) == "non-finite" and set(statuses.values()) == {"ok"}
    assert every(np.isfinite(value).all() for value in result.adapters.values())
    assert every(torch.equal(own_values(parts)[block][victim], value) for block, value in kept.items())
    if mode == "bitwise":
        assert result.digest == run_without(root, monkeypatch, victim).digest, "as if it had not been there"


def test_values_that_blow_up_are_left_out_too(root: Path) -> None:
    """A rate of 1e8 drives every client beyond the range of the exact sums: the global adapters stay as they were."""
    config = make_config(root, "blown-up", ROUND, {"local": {"lr": 1e8, "clip": None}})
    parts, journal = build(config, *alone())
    start = {key: value.clone().numpy() for key, _, value in parts.state.adapters.items(0)}
    result = finish(parts, journal)
    (event,) = [event for event in result.events if event["event"] == "round"]
    assert event["dropped"] == 6
    assert every(np.array_equal(result.adapters[key], start[key]) for key in start)
