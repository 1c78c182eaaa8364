"""What a training pass keeps, counted in real passes of every family, and what the planner takes for it.

The models have the ratios of the five whose configurations are in configs/models, at a sixteenth of their widths: heads that do
not divide the model width, fewer heads for keys, latent attention, shared experts and layers without experts.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planned import small
from small_models import MODELS, projections, write_small
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedmoe_ds.bench.calibration.waves import Bench
from fedmoe_ds.config.schema import MethodConfig
from fedmoe_ds.kernels.frozen_layers import FrozenLinear
from fedmoe_ds.methods import LocalStep, ModelFacts, Objective, Routing, Statistic, load_method
from fedmoe_ds.methods.fedfm import FedFM
from fedmoe_ds.methods.flood import FLood
from fedmoe_ds.model import cross_entropy
from fedmoe_ds.model.forward import AdaptedModel
from fedmoe_ds.model.objective import Asked, Output
from fedmoe_ds.planner import Job
from fedmoe_ds.planner.activations import DECISION, activations, kept_bytes, logit_bytes

__all__ = ["small"]

# Nothing below the first experts is trained there: with dense layers first, and without.
UNADAPTED = ("deepseek-v3", "olmoe-1b-7b")
SEQUENCES, LENGTH = 4, 48
TOLERANCE = 0.05


class Alive(TorchDispatchMode):
    """Storages that operations made while it was on, and which of them are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in given:
                storage = leaf.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    @property
    def bytes(self) -> int:
        return sum(size for storage, size in self.made.values() if not storage.expired())


def kept(bench: Bench, monkeypatch: pytest.MonkeyPatch, cap: int) -> int:
    """Bytes that the forward pass of a local step leaves behind."""
    found: list[int] = []
    real = AdaptedModel.loss

    def counted(*arguments: Any, **rest: Any) -> Any:
        with Alive() as alive:
            result = real(*arguments, **rest)
            found.append(alive.bytes)
        return result

    monkeypatch.setattr(AdaptedModel, "loss", counted)
    bench.train(SEQUENCES, LENGTH, cap)
    return found[-1]


@pytest.mark.parametrize(("name", "adapted"), [*((name, "all") for name in MODELS), *((name, "none") for name in UNADAPTED)])
def test_kept_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, adapted: str) -> None:
    shape = write_small(name, tmp_path / "model")
    bench = Bench(shape, projections(name) if adapted == "all" else [], tmp_path / "model")
    found = kept(bench, monkeypatch, cap=2)
    local = bench.job.config.local.model_copy(update={"batch_size": SEQUENCES})
    job = replace(bench.job, config=bench.job.config.model_copy(update={"local": local}))
    planned = SEQUENCES * LENGTH * kept_bytes(job, LENGTH, active=2)
    assert planned == pytest.approx(found, rel=TOLERANCE), (planned / (SEQUENCES * LENGTH), found / (SEQUENCES * LENGTH))


ROWS, CLASSES, WIDTH = 96, 512, 8
"""Of a pass whose logits are nearly all that it has."""
OBJECTIVES: dict[str, dict[str, Any]] = {
    "cross-entropy": {"name": "fedit"},
    "a whole step": {"name": "flood", "temperature": 2.0},
    "a chunk at a time": {"name": "flood", "quantile": 0.0, "temperature": 2.0},
    "cosines beside logits": {"name": "fedfm"},
}


@pytest.mark.parametrize("case", OBJECTIVES)
def test_logits_that_an_objective_sees(small: Job, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """The most that there is of them at a time, their gradients among it."""
    monkeypatch.setattr(cross_entropy, "LOGITS", 64 * CLASSES)
    method = load_method(MethodConfig.model_validate(OBJECTIVES[case]))
    own = Objective(loss=lambda given: method.loss(given, 0.5)) if isinstance(method, FLood) else Objective()
    if isinstance(method, FedFM):
        anchors = Statistic(torch.randn(CLASSES, WIDTH), torch.ones(CLASSES, dtype=torch.bool))
        method.facts = ModelFacts(1, 1, 1, 0, classes=CLASSES, width=WIDTH)
        own = Objective(loss=lambda given: method._loss(given, anchors))
    head = FrozenLinear(torch.nn.Linear(WIDTH, CLASSES, bias=False).requires_grad_(False))
    x_ND, labels_N, weight_N = torch.randn(ROWS, WIDTH, requires_grad=True), torch.arange(ROWS), torch.full((ROWS,), 0.1)
    output = Output(head, x_ND, labels_N, weight_N, torch.arange(ROWS), [ROWS], {}, method.whole_steps)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        output.minimise([Asked(own, np.zeros(ROWS, np.int64), LocalStep(ROWS))])
    local = small.config.local.model_copy(update={"batch_size": 4})
    job = replace(small, method=method, size=replace(small.size, vocabulary=CLASSES))
    job = replace(job, config=small.config.model_copy(update={"local": local}))
    # Class sums are made at another time than cosines, so their peaks are no whole number of copies.
    within = 0.1 if isinstance(method, FedFM) else TOLERANCE
    assert logit_bytes(job, ROWS, ROWS // 4) == pytest.approx(most_allocated(profiled), rel=within)


def most_allocated(profiled: Any) -> int:
    """Bytes, the temporaries of torch's own operations among them, which no dispatch mode sees."""
    events = (event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]")
    changes = sorted((event.start_ns(), event.nbytes()) for event in events)
    return max(accumulate(size for _, size in changes))


def test_decisions_that_an_objective_sees(small: Job) -> None:
    """What stays of a layer's routing where the layer itself is recomputed."""
    layout = small.expert_layout
    scores_TE = torch.randn(ROWS, layout.num_experts).softmax(-1)
    weights_TK, experts_TK = scores_TE.topk(layout.top_k)
    kept = Routing(scores_TE, weights_TK, experts_TK, torch.ones_like(weights_TK, dtype=torch.bool)).detached()
    bytes_each = sum(
        value.untyped_storage().nbytes() for value in (kept.probs_TE, kept.weights_TK, kept.experts_TK, kept.kept_TK)
    )
    assert bytes_each == ROWS * layout.top_k * DECISION
    recomputed = small.config.execution.model_copy(update={"activation_checkpointing": True})
    flood = load_method(MethodConfig.model_validate({"name": "flood"}))
    # So few classes that their logits do not matter.
    job = replace(
        small, config=small.config.model_copy(update={"execution": recomputed}), size=replace(small.size, vocabulary=8)
    )
    plain, asking = (replace(job, method=method) for method in (small.method, flood))
    tokens = small.config.local.batch_size * 16
    more = activations(asking, 1, 16) - activations(plain, 1, 16)
    assert more == tokens * layout.top_k * DECISION * len(layout.layers)
