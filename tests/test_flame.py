"""FLAME and FedIT as pure functions: weights, rescalers, refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedmoe_ds.clients.client import Client
from fedmoe_ds.clients.update import ClientUpdate
from fedmoe_ds.config import MethodConfig
from fedmoe_ds.errors import UserError
from fedmoe_ds.methods import Method, ModelFacts, RoundContext, load_method
from fedmoe_ds.methods.fedit import FedIT
from fedmoe_ds.methods.flame import Flame
from fedmoe_ds.model.adapter_bank import BlockSpec

CLIENT = Client(0, "one", 2, 30, 30, 600, cap=2, rank=4)
COUNTS_LE = np.array([[0, 50, 100], [25, 25, 100]])
EXPERT = BlockSpec("experts.down.lora_A", (0, 1), (4, 8), expert=True)
DENSE = BlockSpec("attention.q_proj.lora_A", (0, 1), (4, 8))
RESCALER = BlockSpec("rescaler", (-1,), (1,), personal=True, decay=False)


def update(tokens: int = 100) -> ClientUpdate:
    return ClientUpdate(CLIENT, 0, 0, 5, tokens, COUNTS_LE, finite=True)


def method(**keys: Any) -> Method:
    found = load_method(MethodConfig.model_validate(keys))
    found.facts = ModelFacts(top_k=8, num_experts=16, rank=4, seed=0)
    return found


def rescale(flame: Method, cap: int) -> float | None:
    return flame.assign(replace(CLIENT, cap=cap), RoundContext(1, {})).rescale


def test_weights_are_the_papers() -> None:
    """gamma = (a / S)^t |D|, S in tokens."""
    flame = method(name="flame", temperature=2.0)
    assert isinstance(flame, Flame)
    expected = 0.3 * np.array([[0.0, 0.25, 1.0], [0.0625, 0.0625, 1.0]])
    found = flame.weights(EXPERT, update(), 0.3)
    assert np.allclose(found, expected, rtol=1e-15) and found.dtype == np.float64
    assert np.array_equal(flame.weights(DENSE, update(), 0.3), [0.3, 0.3]), "adapters that are not per expert: plain data size"


def test_zero_temperature_is_fedit() -> None:
    flame, fedit = method(name="flame", temperature=0.0), method(name="fedit")
    assert isinstance(fedit, FedIT)
    for spec in (EXPERT, DENSE):
        assert np.array_equal(flame.weights(spec, update(), 0.3), fedit.weights(spec, update(), 0.3))
    assert np.array_equal(fedit.weights(EXPERT, update(), 0.3), np.full((2, 3), 0.3)), "never activated counts as well"


def test_unused_experts_weigh_nothing() -> None:
    assert method(name="flame", temperature=0.5).weights(EXPERT, update(), 0.3)[0, 0] == 0.0
    empty = ClientUpdate(CLIENT, 0, 0, 0, 0, np.zeros((2, 3), dtype=np.int64), finite=True)
    assert not method(name="flame").weights(EXPERT, empty, 0.3).any(), "no tokens: no weight, and no division by zero"


def test_rescalers() -> None:
    learnable = method(name="flame")
    assert learnable.rescaler == "client" and rescale(learnable, 2) is None
    assert learnable.initial(RESCALER, CLIENT) == 1.0
    per_layer = method(name="flame", rescaler_scope="layer", rescaler_init="ratio")
    assert per_layer.rescaler == "layer" and per_layer.initial(RESCALER, CLIENT) == 4.0
    static = method(name="flame", rescaler="static")
    assert static.rescaler is None and rescale(static, 2) == 4.0 and rescale(static, 8) == 1.0
    assert rescale(method(name="flame", rescaler="none"), 2) is None
    assert method(name="fedit").rescaler is None and rescale(method(name="fedit"), 2) is None


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
    renormalised = replace(flame.facts, renormalised=True)
    flame.check(flame.facts)
    if not refused:
        flame.check(renormalised)
        return
    with pytest.raises(
        UserError, match=r"^method.rescaler(: static|_init: ratio): this model renormalises .*; use rescaler=none"
    ):
        flame.check(renormalised)


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
        ({"name": "fedit", "temperature": 1.0}, r"^method.temperature: unknown key for method 'fedit'"),
    ],
)
def test_mistakes_are_one_line(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        method(**keys)
