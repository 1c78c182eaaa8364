"""FLEX-MoE in plain float64: the linear program by a library, fitness target by target, use row by row.

Keys are those of `reference_methods.py`, whose local training this is.
"""

from __future__ import annotations

import math
from collections import defaultdict
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from reference import Adapters, Task, Trained
from reference_methods import FedIT, Returned
from replay import Replay
from scipy.optimize import linprog
from torch import Tensor

from fedmoe_ds.randomness import generator

Place = tuple[int, int]
"""(layer, expert)."""


class FlexMoE(FedIT):
    """Options: alpha, beta, tolerance, kappa, seed, and `experts`: how many every client holds."""

    own = ("router.weight",)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.places = [(layer, expert) for layer in range(self.reference.layers) for expert in range(self.reference.experts)]
        self.fitness: dict[int, dict[Place, float]] = defaultdict(dict)
        self.assigned = dict.fromkeys(self.places, 0)
        self.plans: list[dict[int, np.ndarray]] = []

    def round(self, tasks: list[Task], fresh: Adapters) -> None:
        self.plans.append(self.plan(tasks))
        super().round(tasks, fresh)
        # What is learnt in a round counts from the next one on.
        for place in self.places:
            self.assigned[place] += sum(int(held_LE[place]) for held_LE in self.plans[-1].values())

    def plan(self, tasks: list[Task]) -> dict[int, np.ndarray]:
        """Who holds what: bool [L, E] by client."""
        shape = self.reference.layers, self.reference.experts
        held = {task.index: np.zeros(shape, dtype=bool) for task in tasks}
        budgets = {task.index: self.options["experts"][task.index] for task in tasks}
        for layer in range(shape[0]):
            values = {task.index: [self.value(task.index, (layer, e)) for e in range(shape[1])] for task in tasks}
            for index, row in self.program(values, budgets).items():
                held[index][layer] = row
        return held

    def value(self, index: int, place: Place) -> float:
        known = [fitness[place] for fitness in self.fitness.values() if place in fitness]
        overall = [value for fitness in self.fitness.values() for value in fitness.values()]
        usual = sum(known) / len(known) if known else sum(overall) / max(len(overall), 1)
        draws = generator(self.options["seed"], "unknown experts", index).random(
            (self.reference.layers, self.reference.experts)
        )
        counts = [self.assigned[place[0], e] for e in range(self.reference.experts)]
        lacks = [max(0.0, sum(counts) / len(counts) - count) for count in counts]
        bonus = self.options["kappa"] * lacks[place[1]] / max(1.0, *lacks)
        return self.fitness[index].get(place, usual + 0.001 * float(draws[place])) + bonus

    def program(self, values: dict[int, list[float]], budgets: dict[int, Any]) -> dict[int, np.ndarray]:
        clients, experts = list(values), self.reference.experts
        mean = sum(budgets.values()) / experts
        most = min(len(clients), math.ceil((1 + self.options["tolerance"]) * mean))
        least = math.floor((1 - self.options["tolerance"]) * mean)
        loads = np.tile(np.eye(experts), len(clients))
        found = linprog(
            [-value for index in clients for value in values[index]],
            A_ub=np.vstack([loads, -loads]),
            b_ub=[most] * experts + [-least] * experts,
            A_eq=np.repeat(np.eye(len(clients)), experts, axis=1),
            b_eq=[budgets[index] for index in clients],
            bounds=(0, 1),
        )
        assert np.abs(found.x - found.x.round()).max() < 1e-6, "the best vertex is integral"
        return dict(zip(clients, found.x.round().astype(bool).reshape(len(clients), experts), strict=True))

    def local(self, task: Task, received: Adapters) -> Trained:
        held_LE, size = self.plans[-1][task.index], self.reference.settings.micro
        passes = iter([step[i : i + size] for step in task.steps for i in range(0, len(step), size)] if size else task.steps)
        losses, targets = dict.fromkeys(self.places, 0.0), dict.fromkeys(self.places, 0)

        def objective(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
            nll_N = logits_NV.logsumexp(-1) - logits_NV.gather(1, labels_N[:, None]).squeeze(1)
            run, rest = self.reference.running, iter(nll_N.tolist())
            assert run is not None
            for sequence, (_, mask) in enumerate(next(passes)):
                for target in np.flatnonzero(mask):
                    nll = next(rest)
                    for layer in range(self.reference.layers):
                        scores = run.logits[layer][sequence][target - 1].tolist()
                        able = [e for e in range(self.reference.experts) if held_LE[layer, e]]
                        for expert in sorted(able, key=lambda e: -scores[e])[: task.cap]:
                            losses[layer, expert] += nll
                            targets[layer, expert] += 1
            return nll_N.sum()

        reference: Any = self.reference
        reference.objective, reference.mixture = objective, partial(self.mixture, held_LE)
        result = super().local(task, received)
        reference.objective = None
        del reference.mixture  # what is left is the class's own
        self.notes = {"loss": losses, "targets": targets}
        return result

    def mixture(
        self, held_LE: np.ndarray, layer: int, gate_ED: Tensor, w13_EFD: Tensor, w2_EDF: Tensor, x_TD: Tensor
    ) -> Tensor:
        """sum_j p_j E_j(x) over those of the held experts with the largest p = softmax(W x), of all experts."""
        run, adapted = self.reference.running, self.reference._adapted
        assert run is not None
        logits_TE = x_TD @ run.adapters[f"layers.{layer}.router.weight"].T
        run.logits.setdefault(layer, []).append(logits_TE)
        probs_TE, held = logits_TE.softmax(-1), torch.from_numpy(np.flatnonzero(held_LE[layer]))
        ranked_TH, order_TH = probs_TE.detach()[:, held].sort(descending=True)
        if run.cap < len(held):
            self.margin = min(self.margin, float((ranked_TH[:, run.cap - 1] - ranked_TH[:, run.cap]).min()))
        chosen_TK, y_TD = held[order_TH[:, : run.cap]], torch.zeros_like(x_TD)
        for expert in held.tolist():
            rows = (chosen_TK == expert).any(1).nonzero().squeeze(1)
            run.counts[layer, expert] += len(rows)
            key = f"layers.{layer}.experts.{expert}"
            gate, up = adapted(x_TD[rows], w13_EFD[expert], f"{key}.gate_up").chunk(2, dim=-1)
            out = adapted(F.silu(gate) * up, w2_EDF[expert], f"{key}.down")
            y_TD = y_TD.index_add(0, rows, probs_TE[rows, expert, None] * out)
        return y_TD

    def step(self, returned: list[Returned], fresh: Adapters) -> None:
        super().step(returned, fresh)
        for one in returned:
            fitness = self.fitness[one.task.index]
            for place, count in one.notes["targets"].items():
                if count:
                    now, beta = math.exp(-self.options["alpha"] * one.notes["loss"][place] / count), self.options["beta"]
                    fitness[place] = (1 - beta) * fitness.get(place, now) + beta * now

    def weight(self, key: str, one: Returned) -> float:
        return used_rows(key, one) if key.split(".")[2] == "experts" else super().weight(key, one)


class ObservedFlexMoE(FedIT):
    """Experts are the package's plan; rows that went to an expert weigh it."""

    own = ("router.weight",)

    def weight(self, key: str, one: Returned) -> float:
        if key.split(".")[2] != "experts":
            return super().weight(key, one)
        replay = self.reference
        assert isinstance(replay, Replay)
        layer, expert = (int(key.split(".")[place]) for place in (1, 3))
        rows = used_rows(key, one)
        assert replay.updates[one.task.index].plan[layer, expert] or not rows, "what is not assigned is not used"
        return rows


def used_rows(key: str, one: Returned) -> float:
    _, layer, _, expert, *_ = key.split(".")
    return float(one.trained.counts[int(layer), int(expert)])
