"""The package's FFT-MoE rounds against the slow float64 reference in `reference_dense.py`, on a Llama and on a ViT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_inputs import EXPERTS, TOP_K, dense_config, write_dense
from federations import alone, build, finish
from reference_dense import DenseReference, Image, Sample, Settings, Task, Text
from reference_inputs import TOLERANCE, check_equal, initial

from fedmoe_ds.clients.batches import local_batches
from fedmoe_ds.data import Sequences
from fedmoe_ds.federation.build import Parts

pytestmark = pytest.mark.timeout(600)

SAMPLES = (13, 9, 7)
# Where a gradient is nearly zero, Adam divides rounding noise by eps: with 1e-4 no element is made of float32's noise alone.
EPS = 1e-4
SGD: dict[str, Any] = {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.01, "lr": 0.1}
# A large lambda_0, so that a mistake in a routing loss is as large as one in the task's.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama-none-sgd": ("llama", {"auxiliary": "none"}, {**SGD, "clip": None}),
    "llama-switch": ("llama", {"auxiliary": "switch", "coefficient": 0.3}, {}),
    "llama-adaptive": ("llama", {"auxiliary": "adaptive", "coefficient": 0.3, "gamma": 0.7}, {"weight_decay": 0.1}),
    "llama-global": ("llama", {"auxiliary": "global", "coefficient": 0.3, "epsilon": 0.2}, {}),
    "vit-none": ("vit", {"auxiliary": "none"}, {}),
    "vit-switch-sgd": ("vit", {"auxiliary": "switch", "coefficient": 0.3}, SGD),
    "vit-adaptive": ("vit", {"auxiliary": "adaptive", "coefficient": 0.3}, {"clip": None}),
    "vit-global-sgd": ("vit", {"auxiliary": "global", "coefficient": 0.3}, SGD),
}
DEGRADED: dict[str, Any] = {"data": {"form": {"kind": "degraded"}}}
FORMS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "ranks": (
        "vit",
        {"linear": True, "width": 1, "shared": 3, "zero": 4, "router_input": "sample"},
        {"name": "mor", "alpha": 0.3},
        DEGRADED,
    ),
    "ranks-switch": ("vit", {"linear": True, "zero": 4}, {"name": "mor", "balance": "switch", "alpha": 0.3}, {}),
    "text": ("llama", {"shared": 2, "zero": 3}, {"auxiliary": "switch", "coefficient": 0.3}, {}),
    "by-sample": ("vit", {"width": 5, "shared": 1, "router_input": "sample"}, {"auxiliary": "adaptive"}, DEGRADED),
}
"""Forms of experts: model, section, method, data."""
MICRO = {"llama-none-sgd": 3, "vit-none": 2}
"""The others' losses are no means over rows, and refuse micro-batches."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    write_dense(folder, samples=SAMPLES)
    return folder


def samples_of(data: Sequences) -> list[Sample]:
    if data.pixels is None or data.labels is None:
        return [Text(ids, mask) for ids, mask in zip(data.input_ids, data.loss_mask, strict=True)]
    scores = np.zeros(len(data)) if data.scores is None else data.scores
    return [Image(p, int(label), score=float(s)) for p, label, s in zip(data.pixels, data.labels, scores, strict=True)]


def tasks(parts: Parts, round_index: int) -> list[Task]:
    found = []
    for client in parts.participants(round_index):
        samples = samples_of(parts.training_data.train(client.index))
        batches = local_batches(client, parts.config.local, parts.config.seed, round_index)
        steps = [[samples[i] for i in batch] for batch in batches]
        found.append(Task(client.index, client.top_k, client.samples, steps))
    return found


@pytest.mark.parametrize("case", CASES)
def test_same_rounds(root: Path, case: str) -> None:
    family, method, local = CASES[case]
    local = {"clip": 0.5, "eps": EPS, "lr": 5e-3, **local}
    told = Settings(experts=EXPERTS, top_k=TOP_K, micro=MICRO.get(case), **method, **local)
    compare(root, case, family, told, {"local": local, "method": method, "execution": {"micro_batch_size": MICRO.get(case)}})


@pytest.mark.parametrize("case", FORMS)
def test_forms_of_experts(root: Path, case: str) -> None:
    family, moe, method, data = FORMS[case]
    local = {"clip": 0.5, "eps": EPS, "lr": 5e-3}
    auxiliary = method.get("auxiliary") or method.get("balance", "degradation")
    weight = method.get("coefficient", method.get("alpha", 1e-2))
    forms = {key: moe[key] for key in ("linear", "shared", "zero") if key in moe} | {"by_sample": "router_input" in moe}
    told = Settings(experts=EXPERTS, top_k=TOP_K, auxiliary=auxiliary, coefficient=weight, **local, **forms)
    compare(root, case, family, told, {"local": local, "method": method, "adapters": {"moe": moe}}, data)


def compare(root: Path, case: str, family: str, told: Settings, *changes: dict[str, Any]) -> None:
    """Two rounds of the package and of the reference: adapters, use of experts, and losses of every budget."""
    few = {"data": {"partition": {"clients": 3}}} if family == "vit" else {}
    config = dense_config(root, family, case, {"seed": 1, "evaluation": {"client_sequences": 0}}, few, *changes)
    parts, journal = build(config, *alone())
    assert sorted(client.top_k for client in parts.clients) == [1, 2, 4]
    start = initial(parts)
    assert not any(bool(value.any()) for key, value in start.items() if ".outer." in key)
    expected = DenseReference(root / family, told, start)
    for round_index in (1, 2):
        expected.round(tasks(parts, round_index))
    assert expected.margin > 1e-6, "routing is too near to a tie for a comparison"
    result = finish(parts, journal)
    check_equal(expected.adapters, {key: torch.from_numpy(value) for key, value in result.adapters.items()})
    assert parts.state.utilisation_LE is not None and (parts.state.utilisation_LE == expected.used).all()
    held = samples_of(parts.data.global_holdout())[: parts.config.evaluation.max_sequences]
    for event in result.events:
        if event["event"] == "eval" and event["round"] == 2:
            assert event["loss"] == pytest.approx(expected.evaluate(held, event["tier"]), rel=TOLERANCE)
