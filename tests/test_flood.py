"""FLood: its schedules, its quantile, and what its parameters turn into FedAvg.

Legend: N targets, V classes.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from dense_inputs import dense_config, write_dense
from federations import Result, make_config, run_alone, write_inputs
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_ds.config.schema import MethodConfig
from fedmoe_ds.methods import load_method, method_for, with_defaults
from fedmoe_ds.methods.flood import FLood, confidence


def flood(**keys: Any) -> FLood:
    method = load_method(MethodConfig.model_validate({"name": "flood", **keys}))
    assert isinstance(method, FLood)
    return method


@pytest.mark.parametrize("schedule", ["cosine", "released"])
@pytest.mark.parametrize("horizon", [1, 8, 1000])
def test_schedules_begin_at_zero_and_end_at_twice_a(schedule: str, horizon: int) -> None:
    method = flood(schedule=schedule, horizon=horizon, amplitude=50.0)
    assert method._weight(0) == 0.0
    assert method._weight(horizon) == method._weight(horizon + 5) == pytest.approx(100.0)
    course = [method._weight(t) for t in range(horizon + 1)]
    assert course == sorted(course)


def test_without_a_horizon_it_is_that_of_the_run(tmp_path: Path) -> None:
    """Kept with the run, so that more rounds do not change those that were trained; and absent where it would do nothing."""
    for rounds in (1, 7):
        base: dict[str, Any] = {"federation": {"rounds": rounds}, "execution": {"micro_batch_size": None}}
        cases: list[tuple[dict[str, Any], int | None]] = [
            ({}, rounds),
            ({"horizon": 3}, 3),
            ({"schedule": "constant"}, None),
            ({"quantile": 0.0}, None),
        ]
        for keys, horizon in cases:
            config = make_config(tmp_path, "horizon", base, {"method": {"name": "flood", **keys}})
            method = method_for(config)
            assert method.params.horizon == horizon
            kept = with_defaults(config, method)
            assert kept.method.model_dump()["horizon"] == horizon and method_for(kept).params == method.params
            if isinstance(method, FLood) and horizon == rounds:
                assert method._weight(rounds) == pytest.approx(2.0)


def test_the_released_schedule_is_a_step() -> None:
    method = flood(schedule="released", horizon=1000, amplitude=50.0)
    assert (
        method._weight(490) < 1e-40
        and method._weight(500) == pytest.approx(50.0)
        and method._weight(510) == pytest.approx(100.0)
    )
    assert flood(schedule="constant", amplitude=3.0)._weight(1) == 3.0


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 200), st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0]), st.integers(0, 9))
def test_exactly_as_many_targets_lie_below_the_quantile(count: int, quantile: float, seed: int) -> None:
    score_N = torch.from_numpy(np.random.default_rng(seed).permutation(count)).float()
    tenths = round(10 * quantile)
    assert int(flood(quantile=quantile).below(score_N).sum()) == tenths * (count - 1) // 10


def test_a_number_added_to_all_logits_moves_scores_alone() -> None:
    """The documented weakness: the model says the same, and weighs more."""
    torch.manual_seed(0)
    logits_NV = torch.randn(9, 5)
    method = flood(temperature=2.0)
    torch.testing.assert_close(method.scores(logits_NV + 3.0), method.scores(logits_NV) + 3.0)
    expected = [2.0 * float((row.double() / 2.0).exp().sum().log()) for row in logits_NV]
    torch.testing.assert_close(method.scores(logits_NV).double(), torch.tensor(expected).double(), rtol=1e-6, atol=1e-6)
    assert torch.equal(method.below(logits_NV[:, 0] + 3.0), method.below(logits_NV[:, 0]))


def test_a_negative_mean_score_is_no_share() -> None:
    update = SimpleNamespace(observed={"score": np.array(-3.0), "scored": np.array(6.0)})
    assert confidence(update) == 0.0  # type: ignore[arg-type]


SHORT: dict[str, Any] = {
    "federation": {"rounds": 2},
    "local": {"max_steps": 2},
    "execution": {"micro_batch_size": None},
    "evaluation": {"max_sequences": 1, "client_sequences": 0},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flood")
    write_dense(folder, ("vit",), samples=(9, 7, 5))
    write_inputs(folder, (9, 7, 5))
    return folder


def result(root: Path, name: str, *changes: dict[str, Any]) -> Result:
    return run_alone(make_config(root, name, SHORT, *changes))


def test_without_scores_and_weights_it_is_fedavg_to_the_bit(root: Path) -> None:
    plain = result(root, "plain", {"method": {"name": "fedit"}})
    one = {"name": "flood", "alpha": 0.0, "schedule": "constant", "amplitude": 1.0}
    assert result(root, "weights-of-one", {"method": one}).digest == plain.digest
    assert result(root, "quantile-zero", {"method": {"name": "flood", "alpha": 0.0, "quantile": 0.0}}).digest == plain.digest
    assert result(root, "alpha", {"method": {"name": "flood", "quantile": 0.0}}).digest != plain.digest
    assert result(root, "weights", {"method": {"name": "flood", "alpha": 0.0, "horizon": 4}}).digest != plain.digest


def test_equal_scores_and_sizes_are_the_plain_mean(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever alpha: both means are then the same one."""
    monkeypatch.setattr("fedmoe_ds.methods.flood.confidence", lambda update: 7.0)
    monkeypatch.setattr(
        FLood, "weights", lambda self, spec, update, share: np.full((len(spec.layers), 16)[: 1 + spec.expert], 0.5)
    )
    found = [result(root, f"equal-{alpha}", {"method": {"name": "flood", "alpha": alpha}}).adapters for alpha in (0.0, 3.0)]
    for key, value in found[0].items():
        np.testing.assert_allclose(found[1][key], value, rtol=1e-5, atol=1e-7, err_msg=key)


def test_classes_of_images_are_targets(root: Path) -> None:
    """One per image: the same bits with one client at a time, other ones without its weights."""
    base = {**SHORT, "method": {"name": "flood", "horizon": 2, "auxiliary": None}}
    base["method"].pop("auxiliary")
    moe = {"adapters": {"attention": [], "moe": {"experts": 1, "width": 8, "top_k": 1}}, "federation": {"tiers": None}}
    digests = [
        run_alone(dense_config(root, "vit", f"images-{i}", base, moe, change)).digest
        for i, change in enumerate(
            [
                {},
                {"execution": {"clients_in_flight": 1}},
                {"method": {"name": "flood", "alpha": 0.0, "quantile": 0.0, "horizon": None}},
            ]
        )
    ]
    assert digests[0] == digests[1] != digests[2]
