"""Rounds of Split-Mix and SHEFL against the slow float64 reference in `reference_ensembles.py`, on a Llama and on a ViT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dense_inputs import EXPERTS, dense_config, write_dense
from federations import alone, build, finish
from reference_dense import Settings
from reference_ensembles import EnsembleReference, base_models
from reference_inputs import TOLERANCE, check_equal, initial
from test_reference_fft_moe import EPS, SAMPLES, SGD, samples_of, tasks

pytestmark = pytest.mark.timeout(600)

ALONE: dict[str, Any] = {"adapters": {"moe": {"top_k": 1}}}
TIERS: dict[str, Any] = {"federation": {"tiers": [{"experts": count, "share": 1.0} for count in (5, 2, 1)]}}
# (model, method, its options in the reference's words, local training)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "llama-split-mix-sgd": ("llama", {"name": "split-mix"}, {}, {**SGD, "clip": None}),
    "vit-shefl": (
        "vit",
        {"name": "shefl", "kappa": 1.5, "density": 0.9, "upload": 1.5},
        {"kappa": 1.5, "density": "0.9", "upload": "1.5"},
        {"weight_decay": 0.1, "clip": 0.5},
    ),
}
MICRO = {"llama-split-mix-sgd": 3}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ensembles")
    write_dense(folder, samples=SAMPLES)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_same_rounds(root: Path, case: str) -> None:
    family, method, options, local = CASES[case]
    local = {"eps": EPS, "lr": 5e-3, **local}
    few = {"data": {"partition": {"clients": 3}}} if family == "vit" else {}
    run = {"execution": {"micro_batch_size": MICRO.get(case)}, "evaluation": {"client_sequences": 0}}
    config = dense_config(root, family, case, {"seed": 1, "local": local, "method": method}, ALONE, TIERS, few, run)
    parts, journal = build(config, *alone())
    budgets = {client.index: client.experts for client in parts.clients}
    assert sorted(budgets.values()) == [1, 2, 5]
    told = Settings(experts=EXPERTS, top_k=1, auxiliary="none", micro=MICRO.get(case), **local)
    expected = EnsembleReference(root / family, told, initial(parts), **options)
    for round_index in (1, 2):
        expected.round_of(tasks(parts, round_index), base_models(1, EXPERTS, round_index, budgets))
    result = finish(parts, journal)
    check_equal(expected.adapters, {key: torch.from_numpy(value) for key, value in result.adapters.items()})
    held = samples_of(parts.data.global_holdout())[: parts.config.evaluation.max_sequences]
    scored = [event for event in result.events if event["event"] == "eval" and event["round"] == 2]
    assert [event["tier_label"] for event in scored] == ["1 e5", "1 e2", "1 e1"]
    for event in scored:
        count = int(event["tier_label"].split("e")[1])
        assert event["loss"] == pytest.approx(expected.evaluate(held, count), rel=TOLERANCE)
