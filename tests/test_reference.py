"""The package's FLAME rounds against the slow float64 reference in `reference.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from federations import alone, build, finish, make_config, own_values, write_inputs
from reference import Reference, Settings
from reference_inputs import TOLERANCE, check_equal, initial, tasks
from reference_methods import FedIT, Flame

from fedmoe_ds.federation.build import Parts
from fedmoe_ds.model.moe_layer import RESCALER

SAMPLES = (13, 9, 7, 5)
# Where a gradient is nearly zero, Adam divides rounding noise by eps: with 1e-4 no element is made of float32's noise alone.
# (The default eps is compared in test_optimizer.py.) With seed 1 no token is near a tie between two experts.
EPS = 1e-4
ALL = ["q_proj", "k_proj", "v_proj", "o_proj"]

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "learnable": (
        {"local": {"schedule": "cosine", "warmup": 0.3}, "federation": {"rounds": 2}},
        {"rescaler": "client", "schedule": "cosine", "warmup": 0.3},
    ),
    "learnable-fast": (
        {"execution": {"reproducible": "fast", "clients_in_flight": 3}},
        {"rescaler": "client"},
    ),
    "per-layer": (
        {
            "method": {"rescaler_scope": "layer", "rescaler_init": "ratio", "temperature": 4.0},
            "adapters": {"attention": ALL},
            "local": {"weight_decay": 0.1},
        },
        {"rescaler": "layer", "temperature": 4.0, "weight_decay": 0.1},
    ),
    "static-fedavg-weights": (
        {
            "method": {"rescaler": "static", "temperature": 0.0},
            "adapters": {"attention": []},
            "local": {"clip": None, "weight_decay": 0.05},
            "execution": {"micro_batch_size": None},
        },
        {"rescaler": "static", "temperature": 0.0, "clip": None, "weight_decay": 0.05, "micro": None},
    ),
    "router-and-losses": (
        {
            "method": {"rescaler": "none"},
            "adapters": {"router": "train"},
            "local": {"balance_loss": 0.05, "z_loss": 0.01},
            "execution": {"micro_batch_size": None},
        },
        {"balance": 0.05, "z": 0.01, "micro": None},
    ),
    "sgd": (
        {
            "method": {"rescaler": "none"},
            "local": {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.01, "lr": 0.1, "z_loss": 0.01},
            "adapters": {"experts": True, "router": "train"},
            "federation": {"rounds": 2},
        },
        {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.01, "lr": 0.1, "z": 0.01},
    ),
    "fedit": ({"method": {"name": "fedit"}, "adapters": {"experts": False}}, {}),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    write_inputs(folder, SAMPLES)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_same_rounds(root: Path, case: str) -> None:
    change, told = CASES[case]
    base = {
        "seed": 1,
        "federation": {"rounds": 1},
        "local": {"eps": EPS, "max_steps": 3},
        "evaluation": {"client_sequences": 0},
    }
    config = make_config(root, case, base, change)
    parts, journal = build(config, *alone())
    assert sorted({client.top_k for client in parts.clients}) == [1, 2, 4, 8]
    given = {"scale": 2.0, "eps": EPS, "clip": 0.5, "micro": 3, **told}
    temperature = given.pop("temperature", 2.0)
    reference = Reference(root / "model", Settings(**given))
    kind = FedIT if case == "fedit" else Flame
    expected = kind(reference, initial(parts), list(range(len(SAMPLES))), temperature=temperature)
    expected.rescalers = initial_rescalers(parts)
    for round_index in range(1, config.federation.rounds + 1):
        expected.round(tasks(parts, round_index), {})
    assert reference.margin > 1e-6, "routing is too near to a tie for a comparison"
    result = finish(parts, journal)
    check_equal(expected.adapters, {key: torch.from_numpy(value) for key, value in result.adapters.items()})
    for index, value in expected.rescalers.items():
        if RESCALER in parts.state.personal.specs:
            assert torch.allclose(parts.state.personal.state(index)[RESCALER].double().flatten(), value, rtol=0, atol=TOLERANCE)
    held = parts.data.global_holdout()
    for event in result.events:
        if event["event"] == "eval" and event["round"] == config.federation.rounds:
            mean = torch.stack([expected.rescalers[c.index] for c in parts.clients if c.top_k == event["tier"]]).mean(0)
            loss = reference.evaluate(expected.adapters, mean, event["tier"], held)
            assert event["loss"] == pytest.approx(loss, rel=TOLERANCE)


def initial_rescalers(parts: Parts) -> dict[int, torch.Tensor]:
    if RESCALER not in parts.state.personal.specs:
        return {client.index: torch.ones(1, dtype=torch.float64) for client in parts.clients}
    values = own_values(parts)[RESCALER]
    return {client.index: values[client.index].clone().double().flatten() for client in parts.clients}
