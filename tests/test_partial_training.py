"""What a client is told not to use or not to train: experts by layer, layers, samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from every import every
from federations import alone, build, make_config, write_inputs
from torch import Tensor

from fedmoe_ds.clients.assignment import Assignment
from fedmoe_ds.clients.batches import local_batches
from fedmoe_ds.clients.client import Client
from fedmoe_ds.clients.hooks import LocalTrainingHooks
from fedmoe_ds.clients.update import ClientUpdate
from fedmoe_ds.config import LocalConfig
from fedmoe_ds.federation.build import Parts
from fedmoe_ds.federation.schedule import schedule

Assign = Callable[[Client, int], Assignment]
DECAY = {"method": {"name": "fedit"}, "local": {"weight_decay": 0.1}, "adapters": {"router": "train"}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("partial")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def parts(root: Path) -> Parts:
    found, journal = build(make_config(root, "partial", DECAY), *alone())
    journal.close()
    return found


def trained(parts: Parts, assign: Assign) -> tuple[list[dict[str, Tensor]], list[ClientUpdate]]:
    """Every client's blocks and report after one round."""
    parts.trainer.hooks = LocalTrainingHooks(assign=assign)
    ((wave,),) = schedule(parts.clients, parts.spec.cost, parts.config.local, 1, 1, None)
    pairs = parts.trainer.train(wave, 1, parts.state.adapters, parts.state.personal.state, parts.data.train)
    values = [{spec.name: view.value(spec).clone() for spec in view.blocks()} for view, _ in pairs]
    return values, [update for _, update in pairs]


def plain(client: Client, round_index: int) -> Assignment:
    return Assignment(client.cap)


def start(parts: Parts) -> dict[str, Tensor]:
    return {name: parts.state.adapters.client(name, 0) for name in parts.state.adapters.specs}


def test_masks_that_leave_nothing_out_change_no_bit(parts: Parts) -> None:
    everything = np.ones(parts.counts_shape, dtype=bool)
    cases: dict[str, dict[str, Any]] = {
        "allowed": {"allowed_LE": everything},
        "trained experts": {"trained_LE": everything},
        "trained layers": {"trained_N": np.ones(8, dtype=bool)},
        "samples": {"samples": None},
    }
    expected, _ = trained(parts, plain)
    for case, fields in cases.items():
        found, _ = trained(parts, lambda client, index, own=fields: Assignment(client.cap, **own))  # type: ignore[misc]
        pairs = zip(expected, found, strict=True)
        assert every(torch.equal(a[name], b[name]) for a, b in pairs for name in a), case


def test_experts_that_a_layer_does_not_allow(parts: Parts) -> None:
    """Another set in every layer, which a mask for all layers could not say."""
    layers, experts = parts.counts_shape
    allowed_LE = (np.arange(experts)[None] + np.arange(layers)[:, None]) % 2 == 0
    _, updates = trained(parts, lambda client, _: Assignment(client.cap, allowed_LE=allowed_LE))
    for update in updates:
        assert not update.counts_LE[~allowed_LE].any()
        assert (update.counts_LE.sum(1) > 0).all(), "every layer has routed rows"


def test_experts_that_are_not_trained_run_forward_and_keep_their_bits(parts: Parts) -> None:
    layers, experts = parts.counts_shape
    trained_LE = (np.arange(experts)[None] + np.arange(layers)[:, None]) % 2 == 0
    whole, full = trained(parts, plain)
    found, updates = trained(parts, lambda client, _: Assignment(client.cap, trained_LE=trained_LE))
    received = start(parts)
    for update, other, values, theirs in zip(updates, full, found, whole, strict=True):
        assert update.losses is not None and other.losses is not None
        # Before the first step nothing has been learnt: the forward pass is that of all experts, added up in two parts.
        assert update.losses[0] == pytest.approx(other.losses[0], rel=1e-6)
        assert not update.trained_LE[~trained_LE].any() and (update.counts_LE[~trained_LE] > 0).any()
        for name, value in values.items():
            if not parts.execution.bank.specs[name].expert:
                continue
            left = torch.from_numpy(~trained_LE)
            assert torch.equal(value[left], received[name][left]), f"{name}: decay has moved what is not trained"
            assert not torch.equal(value[~left], received[name][~left]), name
        assert any(not torch.equal(values[name], theirs[name]) for name in values)


def test_layers_that_are_not_trained_keep_their_bits(parts: Parts) -> None:
    last = parts.spec.size.layers - 1
    trained_N = np.arange(parts.spec.size.layers) == last
    found, updates = trained(parts, lambda client, _: Assignment(client.cap, trained_N=trained_N))
    received = start(parts)
    for update, values in zip(updates, found, strict=True):
        for name, value in values.items():
            spec = parts.execution.bank.specs[name]
            for place, layer in enumerate(spec.layers):
                same = torch.equal(value[place], received[name][place])
                assert same == (layer != last), (name, layer)
            weight = parts.spec.method.weights(spec, update, 0.5)
            expected = np.array([0.5 if layer == last else 0.0 for layer in spec.layers])
            assert np.array_equal(weight, np.broadcast_to(expected[:, None], weight.shape) if spec.expert else expected)


def test_a_client_that_uses_some_of_its_samples() -> None:
    client, local = Client(3, "c", 2, 10, 10, 100, 2), LocalConfig(epochs=2.0, batch_size=3)
    chosen = np.array([1, 4, 5, 8])
    batches = local_batches(client, local, 7, 2, chosen)
    # Two passes over four samples in steps of three, the last of which begins a third pass.
    assert [len(batch) for batch in batches] == [3, 3, 3]
    assert sorted(np.concatenate(batches)[:4]) == sorted(np.concatenate(batches)[4:8]) == chosen.tolist()
    whole = local_batches(client, local, 7, 2)
    assert all(np.array_equal(a, b) for a, b in zip(whole, local_batches(client, local, 7, 2, np.arange(10)), strict=True))
    few = replace(client, sequences=2)
    assert [len(batch) for batch in local_batches(few, local, 7, 2)] == [2, 2]
