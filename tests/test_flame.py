"""FLAME and FedAvg as pure functions: weights, rescalers, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedmoe_ds.clients.client import Client
from fedmoe_ds.clients.wave import Report
from fedmoe_ds.config import MethodConfig
from fedmoe_ds.errors import UserError
from fedmoe_ds.methods import Method, load_method
from fedmoe_ds.methods.fedavg import FedAvg
from fedmoe_ds.methods.flame import Flame

CLIENT = Client(0, "one", 2, 30, 30, 600)
COUNTS_LE = np.array([[0, 50, 100], [25, 25, 100]])


def report(tokens: int = 100) -> Report:
    return Report(CLIENT, 0, 0, 5, tokens, COUNTS_LE, finite=True)


def method(**keys: Any) -> Method:
    return load_method(MethodConfig.model_validate(keys))


def test_weights_are_the_papers() -> None:
    """gamma = (a / S)^t |D|, S in tokens."""
    flame = method(name="flame", temperature=2.0)
    assert isinstance(flame, Flame)
    expected = 0.3 * np.array([[0.0, 0.25, 1.0], [0.0625, 0.0625, 1.0]])
    assert np.allclose(flame.expert_weights(report(), 0.3), expected, rtol=1e-15)
    assert flame.expert_weights(report(), 0.3).dtype == np.float64
    assert flame.dense_weight(report(), 0.3) == 0.3, "adapters that are not per expert: plain data size"


def test_zero_temperature_is_fedavg() -> None:
    flame, fedavg = method(name="flame", temperature=0.0), method(name="fedavg")
    assert isinstance(fedavg, FedAvg)
    assert np.array_equal(flame.expert_weights(report(), 0.3), fedavg.expert_weights(report(), 0.3))
    assert np.array_equal(fedavg.expert_weights(report(), 0.3), np.full((2, 3), 0.3)), "never activated counts as well"
    assert flame.dense_weight(report(), 0.3) == fedavg.dense_weight(report(), 0.3)


def test_unused_experts_weigh_nothing() -> None:
    assert method(name="flame", temperature=0.5).expert_weights(report(), 0.3)[0, 0] == 0.0
    empty = Report(CLIENT, 0, 0, 0, 0, np.zeros((2, 3), dtype=np.int64), finite=True)
    assert not method(name="flame").expert_weights(empty, 0.3).any(), "no tokens: no weight, and no division by zero"


def test_rescalers() -> None:
    learnable = method(name="flame")
    assert learnable.rescaler == "client" and learnable.fixed_rescale(2, 8) is None
    assert learnable.initial_rescaler(CLIENT, 8) == 1.0
    per_layer = method(name="flame", rescaler_scope="layer", rescaler_init="ratio")
    assert per_layer.rescaler == "layer" and per_layer.initial_rescaler(CLIENT, 8) == 4.0
    static = method(name="flame", rescaler="static")
    assert static.rescaler is None and static.fixed_rescale(2, 8) == 4.0 and static.fixed_rescale(8, 8) == 1.0
    assert method(name="flame", rescaler="none").fixed_rescale(2, 8) is None
    assert method(name="fedavg").rescaler is None


@pytest.mark.parametrize(
    ("keys", "refused"),
    [
        ({"rescaler": "static"}, True),
        ({"rescaler": "learnable", "rescaler_init": "ratio"}, True),
        ({"rescaler": "learnable"}, False),
        ({"rescaler": "none", "rescaler_init": "ratio"}, False),
    ],
)
def test_renormalising_models_need_no_static_rescaler(keys: dict[str, Any], refused: bool) -> None:
    flame = method(name="flame", **keys)
    flame.check(8, renormalised=False)
    if not refused:
        flame.check(8, renormalised=True)
        return
    with pytest.raises(UserError, match=r"^method.rescaler: static: this model renormalises .*; use rescaler=none"):
        flame.check(8, renormalised=True)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "flam"}, r"^method.name: flam: there is no such method; did you mean 'flame'\?"),
        (
            {"name": "flame", "temprature": 1.0},
            r"^method.temprature: unknown key for method 'flame'; did you mean 'temperature'\?",
        ),
        ({"name": "flame", "temperature": -1.0}, r"^method.temperature: -1.0: "),
        ({"name": "flame", "rescaler": "maybe"}, r"^method.rescaler: 'maybe': "),
        ({"name": "fedavg", "temperature": 1.0}, r"^method.temperature: unknown key for method 'fedavg'"),
    ],
)
def test_mistakes_are_one_line(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        method(**keys)
