"""EWWA-FL, FedNova and q-FedAvg: what must hold exactly, beside their references (`reference_weights.py`)."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from federations import Result, make_config, run_alone, write_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmoe_ds.config import LocalConfig, MethodConfig
from fedmoe_ds.errors import UserError
from fedmoe_ds.methods import Method, ModelFacts, load_method, method_for
from fedmoe_ds.methods.ewwa_fl import EWWAFL, FIRST, LARGEST_EXPONENT, ROUNDS, SECOND, exponential
from fedmoe_ds.methods.fedit import FedIT
from fedmoe_ds.methods.fednova import way_length
from fedmoe_ds.methods.q_fedavg import QFedAvg
from fedmoe_ds.model.adapter_bank import BlockSpec, remembered_block

QUICK: dict[str, Any] = {
    "federation": {"rounds": 1},
    "local": {"optimizer": "sgd", "lr": 0.5, "clip": None, "steps": 2},
    "evaluation": {"client_sequences": 0, "max_sequences": 1, "every": 9},
    "execution": {"micro_batch_size": None},
}
BLOCK = BlockSpec("router.weight", (0,), (3, 5))
FLOATS = st.floats(-1, 1, allow_subnormal=False)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weighing")
    write_inputs(folder)
    return folder


def result(root: Path, tag: str, **method: Any) -> Result:
    return run_alone(make_config(root, tag, QUICK, {"method": method}))


def equal_weights(root: Path, tag: str, patch: pytest.MonkeyPatch) -> Result:
    """FedAvg in which all clients count alike."""
    patch.setattr(FedIT, "weights", lambda self, spec, update, share: Method.weights(self, spec, update, 1.0), raising=False)
    return result(root, tag, name="fedit")


def close(ours: Result, theirs: Result) -> None:
    """To the rounding of float32, and not by having stayed where they were."""
    assert ours.adapters.keys() == theirs.adapters.keys()
    for key, value in ours.adapters.items():
        np.testing.assert_allclose(value, theirs.adapters[key], rtol=3e-7, atol=1e-7, err_msg=key)
    assert any(value.any() for key, value in ours.adapters.items() if key.endswith("lora_B"))


# EWWA-FL


def ewwa(**keys: Any) -> EWWAFL:
    method = load_method(MethodConfig.model_validate({"name": "ewwa-fl", **keys}))
    assert isinstance(method, EWWAFL)
    return method


class Life:
    """One client of EWWA-FL, round after round."""

    def __init__(self, method: EWWAFL) -> None:
        self.method = method
        moments = {remembered_block(BLOCK, word).name: torch.zeros(1, *BLOCK.item) for word in (FIRST, SECOND)}
        self.state = {**moments, ROUNDS.name: torch.zeros(1, 1)}

    def weights(self, received: Tensor, returned: Tensor) -> Tensor:
        """Those of what the client returned, float64."""
        view: Any = SimpleNamespace(
            blocks=lambda: [BLOCK],
            value=lambda spec: returned,
            received=lambda spec: received,
            client_state=self.state,
            slots={True: 0, False: 0},
        )
        update: Any = SimpleNamespace(remembered=self.method.remember_blocks(view))
        found = self.method.element_weights(BLOCK, view, update)
        assert found.dtype == torch.float32
        self.state = self.state | update.remembered
        return found.double()


def test_equal_elements_are_equal_weights_to_the_bit(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = result(root, "ewwa", name="ewwa-fl", alpha=0.0)
    assert ours.digest == equal_weights(root, "ewwa-equal", monkeypatch).digest
    assert ours.digest != result(root, "ewwa-one", name="ewwa-fl", alpha=1.0).digest


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(FLOATS, min_size=15, max_size=15), min_size=1, max_size=6))
def test_weights_follow_adam_over_the_clients_own_rounds(rounds: list[list[float]]) -> None:
    client, received = Life(ewwa(alpha=2.0)), torch.full((1, *BLOCK.item), 0.5)
    first = second = torch.zeros(1, *BLOCK.item, dtype=torch.float64)
    for count, moved in enumerate(rounds, 1):
        returned = received + torch.tensor(moved).view(1, *BLOCK.item)
        g = received.double() - returned.double()
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
        b = 2 * first / (1 - 0.9**count) / (second / (1 - 0.999**count) + 1e-8).sqrt()
        found = client.weights(received, returned).log()
        # Moments are kept in float32.
        assert torch.allclose(found, b, atol=2e-3) and float(b.abs().max()) <= 2 * 7.3


def test_the_first_round_knows_signs_and_favours_those_who_go_down() -> None:
    """x -> -x does not give the mirrored mean: a step down weighs e^alpha, the same step up e^-alpha."""
    received, step = torch.zeros(1, *BLOCK.item), torch.linspace(0.1, 1, 15).view(1, *BLOCK.item)
    down, up = (Life(ewwa()).weights(received, received + sign * step) for sign in (-1, 1))
    assert torch.allclose(down, torch.tensor(math.e).double(), rtol=1e-5)
    assert torch.allclose(up, torch.tensor(1 / math.e).double(), rtol=1e-5)
    mean = (down * -step + up * step) / (down + up)
    assert bool((mean < -0.7 * step).all()), "and not zero"


@settings(max_examples=50, deadline=None)
@given(st.floats(-LARGEST_EXPONENT, LARGEST_EXPONENT))
def test_exponentials_are_the_same_wherever_they_stand(x: float) -> None:
    row = torch.cat([torch.linspace(-3, 3, 17, dtype=torch.float64), torch.tensor([x], dtype=torch.float64)])
    found = exponential(row)
    assert float(found[-1]) == float(exponential(row[-1:])) == float(exponential(row.flip(0))[0])
    assert math.isclose(float(found[-1]), math.exp(x), rel_tol=5e-14)
    assert float(exponential(torch.zeros(1, dtype=torch.float64))) == 1.0


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"beta1": 0.9, "beta2": 0.8}, r"^method.beta2: 0.8: must be above beta1\^2 = 0.81, .*; raise it$"),
        ({"alpha": 6.0}, r"^method.alpha: 6.0: weights would reach exp\(43\.\d\), .*; use 5\.\d+ or less$"),
    ],
)
def test_weights_without_a_bound_are_refused(tmp_path: Path, params: dict[str, float], words: str) -> None:
    with pytest.raises(UserError, match=words):
        method_for(make_config(tmp_path, "bound", {"method": {"name": "ewwa-fl", **params}}))


# FedNova


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.floats(0.01, 0.99), st.floats(1e-3, 0.5))
def test_ways_are_the_papers_norms(tau: int, rho: float, alpha: float) -> None:
    eta = 0.1
    rates, mu = (eta,) * tau, alpha / eta
    assert math.isclose(way_length(rates, 0.0, 0.0), eta * tau, rel_tol=1e-9)
    momentum = (tau - rho * (1 - rho**tau) / (1 - rho)) / (1 - rho)
    assert math.isclose(way_length(rates, rho, 0.0), eta * momentum, rel_tol=1e-6)
    assert math.isclose(way_length(rates, 0.0, mu), eta * (1 - (1 - alpha) ** tau) / alpha, rel_tol=1e-6)


def test_equal_steps_are_federated_averaging(root: Path) -> None:
    close(result(root, "nova", name="fednova"), result(root, "nova-fedit", name="fedit"))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0.1, 1.0)), min_size=1, max_size=5))
def test_steps_that_differ_do_not_bias_the_direction(clients: list[tuple[int, float]]) -> None:
    """Clients whose gradients are constant: x moves by tau_eff times the weighted mean of their gradients, whatever tau_i."""
    method = load_method(MethodConfig.model_validate({"name": "fednova"}))
    method.facts = ModelFacts(1, 1, 1, 0, local=LocalConfig(optimizer="sgd"))
    moved, tallies = 0.0, {"share": np.zeros(1), "way": np.zeros(1)}
    for place, (tau, share) in enumerate(clients):
        update: Any = SimpleNamespace(
            rates=(0.1,) * tau, counts_LE=np.ones((1, 1)), assignment=SimpleNamespace(trains=lambda spec: None)
        )
        moved += float(method.weights(BLOCK, update, share)[0]) * 0.1 * tau * (place + 1)
        for name, value in method.tally(BLOCK, update, share).items():
            tallies[name] = tallies[name] + value
    whole = sum(share for _, share in clients)
    direction = sum(share / whole * (place + 1) for place, (_, share) in enumerate(clients))
    effective = sum(share / whole * tau for tau, share in clients)
    assert math.isclose(moved * float(np.asarray(method.factor(tallies))[0]), 0.1 * effective * direction, rel_tol=1e-9)


@pytest.mark.parametrize("name", ["fednova", "q-fedavg"])
def test_adams_steps_are_no_sums_of_gradients(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"^local.optimizer: adamw: .*; use sgd"):
        method_for(make_config(tmp_path, "adamw", {"method": {"name": name}}))
    method_for(make_config(tmp_path, "sgd", {"method": {"name": name}, "local": {"optimizer": "sgd"}}))
    if name == "q-fedavg":
        method_for(make_config(tmp_path, "named", {"method": {"name": name, "lipschitz": 2.0}}))
        method_for(make_config(tmp_path, "alike", {"method": {"name": name, "q": 0.0}}))


# q-FedAvg


def test_without_q_all_clients_count_alike(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    close(result(root, "q-none", name="q-fedavg", q=0.0), equal_weights(root, "q-equal", monkeypatch))


@settings(max_examples=30, deadline=None)
@given(st.floats(0.1, 5), st.floats(1.01, 3), st.floats(0.1, 5), st.floats(0, 2))
def test_a_higher_loss_has_more_say(low: float, times: float, q: float, square: float) -> None:
    method = load_method(MethodConfig.model_validate({"name": "q-fedavg", "q": q, "lipschitz": 2.0}))
    assert isinstance(method, QFedAvg)

    def asked(loss: float) -> tuple[float, float]:
        update: Any = SimpleNamespace(
            shared_losses=(9.0, loss),
            measured={"router.weight.change": np.array([square / 2, square / 2]), "other": np.array([7.0])},
            counts_LE=np.ones((1, 1)),
            assignment=SimpleNamespace(trains=lambda spec: None),
        )
        return float(method.weights(BLOCK, update, 0.3)[0]), float(method.tally(BLOCK, update, 0.3)["h"][0])

    (weight, _), (more, h) = asked(low), asked(low * times)
    assert math.isclose(more / weight, times**q, rel_tol=1e-6)
    loss = low * times
    assert math.isclose(h, q * loss ** (q - 1) * 4 * square + 2 * loss**q, rel_tol=1e-6)
