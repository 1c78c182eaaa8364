"""OTA-FFL's weights against a linear program, its channel against its definition."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from every import every
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from fedmoe_ds.config import MethodConfig
from fedmoe_ds.devices.channel import fading
from fedmoe_ds.methods import MeanContext, Method, ModelFacts, load_method
from fedmoe_ds.methods.ota_ffl import chebyshev_weights, de_noising

SEEDS, EPSILON = st.integers(0, 10**6), st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0])


def drawn(seed: int, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Shares and losses of a few clients."""
    draw = np.random.default_rng(seed)
    count = int(draw.integers(1, 9))
    samples = draw.integers(1, 50, size=count).astype(float)
    losses = draw.integers(0, 3, size=count).astype(float) if ties else draw.random(count)
    return samples / samples.sum(), losses


@given(SEEDS, EPSILON, st.booleans())
def test_weights_are_the_linear_programs(seed: int, epsilon: float, ties: bool) -> None:
    share_K, loss_K = drawn(seed, ties)
    weight_K = chebyshev_weights(share_K, loss_K, epsilon)
    assert math.isclose(weight_K.sum(), 1.0, rel_tol=1e-12)
    assert every(weight_K >= -1e-15) and every(np.abs(weight_K - share_K) <= epsilon + 1e-12)
    box = [(max(p - epsilon, 0.0), min(p + epsilon, 1.0)) for p in share_K]
    best = linprog(-loss_K, A_eq=[np.ones(len(share_K))], b_eq=[1.0], bounds=box)
    assert math.isclose(float(weight_K @ loss_K), -best.fun, rel_tol=1e-7, abs_tol=1e-9)


@given(SEEDS, EPSILON, st.floats(0.0, 1.0))
def test_a_higher_loss_never_lowers_a_weight(seed: int, epsilon: float, more: float) -> None:
    share_K, loss_K = drawn(seed)
    before = chebyshev_weights(share_K, loss_K, epsilon)[0]
    loss_K[0] += more
    assert chebyshev_weights(share_K, loss_K, epsilon)[0] >= before - 1e-12


@given(SEEDS)
def test_no_room_and_no_difference_leave_the_shares(seed: int) -> None:
    share_K, loss_K = drawn(seed)
    assert chebyshev_weights(share_K, loss_K, 0.0).tolist() == share_K.tolist()
    assert chebyshev_weights(share_K, np.zeros_like(loss_K), 0.3).tolist() == share_K.tolist()


def test_equal_losses_are_treated_alike_and_all_room_goes_to_the_highest() -> None:
    weight_K = chebyshev_weights(np.full(4, 0.25), np.array([1.0, 2.0, 1.0, 2.0]), 0.1)
    assert np.allclose(weight_K, [0.15, 0.35, 0.15, 0.35], rtol=1e-12)
    assert np.allclose(chebyshev_weights(np.array([0.2, 0.3, 0.5]), np.array([1.0, 3.0, 2.0]), 1.0), [0, 1, 0], atol=1e-15)


@given(SEEDS, st.floats(0.1, 10.0))
def test_power_limits_are_met_and_one_of_them_exactly(seed: int, power: float) -> None:
    draw = np.random.default_rng(seed)
    weight_K, scale_K, amplitude_K = draw.random(5) + 0.01, draw.random(5), draw.random(5) + 0.01
    eta = de_noising(weight_K, scale_K, amplitude_K, power)
    sent_K = eta * (weight_K * scale_K / amplitude_K) ** 2
    assert every(sent_K <= power * (1 + 1e-12)) and math.isclose(sent_K.max(), power, rel_tol=1e-12)
    assert math.isclose(de_noising(weight_K, scale_K, 3.0 * amplitude_K, power), 9.0 * eta, rel_tol=1e-12)


def test_who_sends_nothing_needs_no_power() -> None:
    assert de_noising(np.ones(2), np.zeros(2), np.ones(2), 1.0) == math.inf


def made(seed: int, **params: Any) -> Method:
    method = load_method(MethodConfig.model_validate({"name": "ota-ffl", **params}))
    method.facts = ModelFacts(1, 1, 1, seed)
    return method


MEMORIES = {
    index: {name: np.array(value) for name, value in {"loss": 1.0, "weight": weight, "scale": scale}.items()}
    for index, (weight, scale) in enumerate([(0.2, 1.0), (0.5, 0.4), (0.3, 0.9)])
}
CONTEXT = MeanContext(4, MEMORIES)
MEAN = torch.linspace(-1.0, 1.0, 12).view(3, 4)


def noise(method: Method, key: str, context: MeanContext = CONTEXT) -> torch.Tensor:
    rule = method.after_mean(context)
    assert rule is not None
    return rule(key, MEAN) - MEAN


def test_noise_has_the_variance_of_the_closed_form_and_no_mean() -> None:
    amplitude_K = np.sqrt(fading(0, 4, [0, 1, 2]))
    eta = de_noising(np.array([0.2, 0.5, 0.3]), np.array([1.0, 0.4, 0.9]), amplitude_K, 1.0)
    method = made(0, snr_db=20.0)
    drawn = torch.stack([noise(method, f"layers.{i}.x") for i in range(1000)]).double()
    variance, count = 0.01 / eta, drawn.numel()
    # Five standard errors: of a variance sqrt(2 / n) of it, of a mean of 1000 draws.
    assert abs(float(drawn.square().mean()) - variance) < 5 * variance * math.sqrt(2 / count)
    assert every((drawn.mean(0).abs() < 5 * math.sqrt(variance / 1000)).flatten().tolist())


def test_noise_is_addressed_by_seed_round_and_tensor() -> None:
    first = noise(made(0), "layers.0.experts.3.down.lora_A")
    assert torch.equal(first, noise(made(0), "layers.0.experts.3.down.lora_A"))
    later = MeanContext(5, MEMORIES)
    others = [noise(made(0), "layers.0.experts.2.down.lora_A"), noise(made(1), "layers.0.experts.3.down.lora_A")]
    assert not any(torch.equal(first, other) for other in others)
    ratio = noise(made(0), "layers.0.experts.3.down.lora_A", later) / first
    assert ratio.std() > 0.1  # another draw, and not the same one scaled


def test_only_those_who_sent_count() -> None:
    # Client 2 alone: its weight is normalised away, and the whole noise is due to its channel.
    alone = noise(made(0, snr_db=20.0), "x", MeanContext(4, {2: MEMORIES[2]}))
    deviation = 0.1 * 0.9 / math.sqrt(fading(0, 4, [2])[0])
    other = noise(made(0, snr_db=20.0), "x")
    assert torch.allclose(alone / other, (alone / other)[0, 0].expand_as(MEAN), rtol=1e-3)
    assert abs(float(alone.std()) / deviation - 1) < 0.6
    assert made(0).after_mean(MeanContext(4, {})) is None


def test_a_silent_channel_touches_nothing() -> None:
    assert made(0, snr_db=None).after_mean(CONTEXT) is None


def test_scale_is_the_root_mean_square_and_unseen_clients_count_with_the_mean() -> None:
    method: Any = made(0, epsilon=1.0)
    method.elements = {"experts.up": 4, "router.weight": 2}
    measured = {"experts.up": np.array([[4.0, 0.0], [2.0, 2.0]]), "router.weight": np.array([5.0, 7.0])}
    part = SimpleNamespace(weight=0.25)
    update: Any = SimpleNamespace(plan=part, losses=(3.0, 1.0), measured=measured)
    found = method.memorise(update)
    assert {name: float(value) for name, value in found.items()} == {"loss": 3, "weight": 0.25, "scale": 1.0}
    context: Any = SimpleNamespace(drawn=[SimpleNamespace(index=i) for i in (4, 5, 6)])
    context.memories = {4: {"loss": np.array(1.0)}, 6: {"loss": np.array(4.0)}}
    assert method._losses(context).tolist() == [1.0, 2.5, 4.0]
    assert made(0).memory().keys() == found.keys()


@pytest.mark.parametrize("keys", [{"epsilon": 1.5}, {"snr_db": -100.0}])
def test_parameters_out_of_range_are_refused(keys: dict[str, float]) -> None:
    with pytest.raises(Exception, match=f"method.{next(iter(keys))}"):
        made(0, **keys)
