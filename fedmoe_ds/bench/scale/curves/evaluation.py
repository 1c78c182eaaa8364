"""Evaluation of clients' own models without its passes: what every client costs beside them."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from fedmoe_ds.bench.scale.synthetic import clients_of, sizes_of
from fedmoe_ds.checkpoint.personal_state import Personal
from fedmoe_ds.clients.assignment import Assignment
from fedmoe_ds.config import Config
from fedmoe_ds.data import Sequences
from fedmoe_ds.distributed.control import Alone
from fedmoe_ds.distributed.launcher import Launch
from fedmoe_ds.distributed.runtime import Runtime
from fedmoe_ds.federation.evaluation import SUMS, Evaluator
from fedmoe_ds.methods import load_method
from fedmoe_ds.model.adapter_bank import Bank, BlockSpec
from fedmoe_ds.model.dispatcher import Pool

NAME = "evaluation"
X = "clients"
POINTS = (1_000, 10_000, 100_000)
WALL = "passes over the global hold-out, one model after the other: linear in clients where models are their own"
_SPEC = BlockSpec("attention.q_proj.lora_B", (0, 1), (8, 4), personal=True)


class _HoldOuts:
    """Two sequences for every client, and four for everybody."""

    def __init__(self) -> None:
        ids, mask = np.arange(8, dtype=np.int64), np.ones(8, dtype=np.bool_)
        self.own, self.everybodys = Sequences([ids] * 2, [mask] * 2), Sequences([ids] * 4, [mask] * 4)

    def holdout(self, client: int) -> Sequences:
        return self.own

    def global_holdout(self) -> Sequences:
        return self.everybodys


class _Unscored(Evaluator):
    def _score(self, parts: list[Sequences], how: Assignment) -> Tensor:
        return torch.ones(SUMS, len(parts), dtype=torch.float64)


def measure(x: int) -> dict[str, float]:
    """Seconds of an evaluation with one model for each tier, and with one for each client (`own_seconds`)."""
    found = {}
    for name, method in (("seconds", "fedit"), ("own_seconds", "fedsa-lora")):
        evaluator, personal = _evaluator(method, x)
        began = time.perf_counter()
        rows = evaluator.scores(personal, per_client=True, plain=False)
        found[name] = time.perf_counter() - began
        assert len(rows) > x, "a row for every client"
    return found


def _evaluator(name: str, count: int) -> tuple[Evaluator, Personal]:
    config = Config.model_validate({"method": {"name": name}})
    method = load_method(config.method)
    method.facts = SimpleNamespace(rank=16, top_k=8)  # type: ignore[assignment]
    runtime = Runtime(Launch("bench", 0, 1, 0), torch.device("cpu"), Alone())
    bank, pool = Bank([_SPEC], 1, 1, with_grad=False), Pool(None, 1, 1, 8, merge=True)
    model: Any = SimpleNamespace(execution=SimpleNamespace(bank=bank, pool=pool), foundation=None)
    spec: Any = SimpleNamespace(method=method, config=config, shares_passes=True)
    clients, data = list(clients_of(sizes_of(count))), cast(Any, _HoldOuts())
    personal = Personal([_SPEC], 1, count)
    for index in range(count if method.personal_models else 0):
        personal.store(index, _SPEC.name, torch.tensor(float(index)))  # everybody's own, so that nobody shares a score
    personal.share(runtime, runtime.control)
    return _Unscored(spec, model, runtime, bank, data, clients, config.execution.clients_in_flight or count), personal
