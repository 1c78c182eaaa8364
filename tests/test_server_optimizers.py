"""Server optimizers against a plain loop over numpy arrays, round by round, with parts that some rounds leave untrained."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from every import every
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_ds.aggregation.server_optimizer import LARGEST, MOMENTUM, VARIANCE, ServerOptimizer
from fedmoe_ds.config import ServerConfig
from fedmoe_ds.model.adapter_bank import Bank, BlockSpec

EXPERT = BlockSpec("experts.down.lora_A", (0, 1), (2, 3), expert=True)
DENSE = BlockSpec("attention.q_proj.lora_B", (0, 1), (4,))
SPECS, EXPERTS, ROUNDS = [EXPERT, DENSE], 3, 5
SETTINGS: list[dict[str, Any]] = [
    {"optimizer": "fedavg"},
    {"optimizer": "fedavg", "lr": 0.3},
    {"optimizer": "fedavgm", "lr": 0.5, "beta1": 0.8},
    {"optimizer": "fedadam", "lr": 0.02, "beta1": 0.7, "beta2": 0.9, "tau": 1e-2},
    {"optimizer": "fedyogi", "lr": 0.02, "beta1": 0.7, "beta2": 0.9, "tau": 1e-2},
    {"optimizer": "fedadagrad", "lr": 0.02, "beta1": 0.7, "tau": 1e-2},
    {"optimizer": "fedams", "lr": 0.02, "beta1": 0.7, "beta2": 0.5, "tau": 1e-2},
]
HEADS = {EXPERT.name: (2, EXPERTS), DENSE.name: (2,)}


def reference(config: ServerConfig, start: np.ndarray, means: list[np.ndarray], trained: list[np.ndarray]) -> np.ndarray:
    """Algorithm 2 of Reddi et al., entry by entry, in float64."""
    found = np.empty_like(start)
    for place in np.ndindex(*start.shape):
        x, m, largest, v = float(start[place]), 0.0, 0.0, 0.0 if config.optimizer == "fedams" else config.tau**2
        for mean, here in zip(means, trained, strict=True):
            if not here[place]:
                continue
            d = float(mean[place]) - x
            if config.optimizer == "fedavg":
                step = d
            elif config.optimizer == "fedavgm":
                step = m = config.beta1 * m + d
            else:
                m = config.beta1 * m + (1 - config.beta1) * d
                if config.optimizer == "fedadam":
                    v = config.beta2 * v + (1 - config.beta2) * d**2
                elif config.optimizer == "fedadagrad":
                    v = v + d**2
                elif config.optimizer == "fedams":
                    v = config.beta2 * v + (1 - config.beta2) * d**2
                    largest = max(largest, v)
                else:
                    v = v - (1 - config.beta2) * d**2 * np.sign(v - d**2)
                step = m / (np.sqrt(largest or v) + config.tau)
            x = x + config.lr * step
        found[place] = x
    return found


def rounds_of(spec: BlockSpec, seed: int) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """(start, the mean of every round, where anybody trained)."""
    draw = np.random.default_rng(seed)
    shape = (*HEADS[spec.name], *spec.item)
    means = [draw.normal(size=shape).astype(np.float32) for _ in range(ROUNDS)]
    return draw.normal(size=shape).astype(np.float32), means, [draw.random(HEADS[spec.name]) < 0.7 for _ in range(ROUNDS)]


@pytest.mark.parametrize("given_settings", SETTINGS, ids=[str(setting) for setting in SETTINGS])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_several_rounds_are_the_plain_loop(given_settings: dict[str, Any], seed: int) -> None:
    config = ServerConfig(**given_settings)
    optimizer = ServerOptimizer(config)
    banks = optimizer.banks(SPECS, EXPERTS)
    for spec in SPECS:
        start, means, trained = rounds_of(spec, seed)
        value = torch.from_numpy(start)
        for mean, here in zip(means, trained, strict=True):
            # What `Statistics.average` gives: the old value where nobody trained.
            where = torch.from_numpy(here).view(*here.shape, *([1] * len(spec.item)))
            filled = torch.where(where, torch.from_numpy(mean), value)
            value = optimizer.step(spec, value, filled, torch.from_numpy(here), banks)
        spread = [np.broadcast_to(here.reshape(*here.shape, *([1] * len(spec.item))), start.shape) for here in trained]
        expected = reference(config, start.astype(np.float64), means, spread)
        assert np.allclose(value.numpy(), expected, rtol=1e-5, atol=1e-6)
        assert value.dtype == torch.float32


@pytest.mark.parametrize("given_settings", SETTINGS[1:], ids=[str(setting) for setting in SETTINGS[1:]])
def test_what_nobody_trained_keeps_value_and_moments(given_settings: dict[str, Any]) -> None:
    optimizer = ServerOptimizer(ServerConfig(**given_settings))
    banks = optimizer.banks(SPECS, EXPERTS)
    start, means, _ = rounds_of(EXPERT, 0)
    everywhere = torch.ones(2, EXPERTS, dtype=torch.bool)
    value = optimizer.step(EXPERT, torch.from_numpy(start), torch.from_numpy(means[0]), everywhere, banks)
    moments = {name: bank.client(EXPERT.name, 0).clone() for name, bank in banks.items()}
    partly = everywhere.clone()
    partly[1, 2] = False
    # Even a mean that says otherwise changes nothing where nobody trained.
    after = optimizer.step(EXPERT, value, torch.from_numpy(means[1]), partly, banks)
    assert torch.equal(after[1, 2], value[1, 2]) and not torch.isclose(after[partly], value[partly]).any()
    for name, bank in banks.items():
        moment = bank.client(EXPERT.name, 0)
        assert torch.equal(moment[1, 2], moments[name][1, 2])
        if name == LARGEST:  # it moves only where the second moment has grown
            continue
        assert not torch.isclose(moment[partly], moments[name][partly], rtol=1e-7, atol=0).all(), name


def test_plain_averaging_takes_the_mean_bit_by_bit() -> None:
    optimizer = ServerOptimizer(ServerConfig())
    start, means, _ = rounds_of(EXPERT, 0)
    mean, trained = torch.from_numpy(means[0]), torch.ones(2, EXPERTS, dtype=torch.bool)
    assert optimizer.plain and optimizer.step(EXPERT, torch.from_numpy(start), mean, trained, {}) is mean
    assert not optimizer.banks(SPECS, EXPERTS)


@pytest.mark.parametrize(
    ("optimizer", "names"),
    [
        ("fedavgm", {MOMENTUM}),
        ("fedadagrad", {MOMENTUM, VARIANCE}),
        ("fedadam", {MOMENTUM, VARIANCE}),
        ("fedyogi", {MOMENTUM, VARIANCE}),
        ("fedams", {MOMENTUM, VARIANCE, LARGEST}),
    ],
)
def test_moments_before_the_first_round(optimizer: Any, names: set[str]) -> None:
    banks: dict[str, Bank] = ServerOptimizer(ServerConfig(optimizer=optimizer, tau=0.5)).banks(SPECS, EXPERTS)
    assert set(banks) == names
    assert every(not bool(value.any()) for value in banks[MOMENTUM].values.values())
    if LARGEST in banks:
        both = [*banks[VARIANCE].values.values(), *banks[LARGEST].values.values()]
        assert every(not bool(value.any()) for value in both), "v and vhat start at zero"
    elif VARIANCE in banks:
        assert every(bool((value == 0.25).all()) for value in banks[VARIANCE].values.values()), "v starts at tau^2"


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), beta2=st.floats(0.0, 0.99))
def test_the_maximum_never_falls(seed: int, beta2: float) -> None:
    optimizer = ServerOptimizer(ServerConfig(optimizer="fedams", lr=0.01, beta2=beta2))
    banks = optimizer.banks(SPECS, EXPERTS)
    start, means, trained = rounds_of(EXPERT, seed)
    value, before, fell = torch.from_numpy(start), torch.zeros(start.shape), False
    for mean, here in zip(means, trained, strict=True):
        second = banks[VARIANCE].client(EXPERT.name, 0).clone()
        value = optimizer.step(EXPERT, value, torch.from_numpy(mean), torch.from_numpy(here), banks)
        largest, variance = (banks[name].client(EXPERT.name, 0) for name in (LARGEST, VARIANCE))
        assert bool((largest >= before).all() and (largest >= variance).all())
        before, fell = largest.clone(), fell or bool((variance < second).any())
    assert fell or beta2 > 0.5, "a second moment that never falls would show nothing"
