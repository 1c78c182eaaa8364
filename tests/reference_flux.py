"""Flux in plain float64: utilities from gradients sample by sample, roles by loops over experts, means over those that tune.

Legend: L layers, E experts.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from reference import Adapters, Task, Trained
from reference_methods import FedIT, Returned

from fedmoe_ds.randomness import generator

Place = tuple[int, int]


class Flux(FedIT):
    """Options: experts (of a layer, by client), exploit, horizon, samples, by client `data`, seed.

    What is drawn is drawn at the package's addresses.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.rounds, self.tuned, self.worth = 0, dict[int, set[Place]](), dict[int, dict[Place, float]]()

    def round(self, tasks: list[Task], fresh: Adapters) -> None:
        self.rounds += 1
        super().round(tasks, fresh)

    def local(self, task: Task, received: Adapters) -> Trained:
        roles = self.roles(task.index)
        self.worth[task.index] = self.utilities(task, received)
        self.tuned[task.index] = roles
        return self.reference.train(
            task,
            received,
            self.rescalers[task.index],
            self.left(task, received),
            extra=self.extra(task, received),
            select=lambda layer, scores_TE: {e for at, e in roles if at == layer},
        )

    def roles(self, index: int) -> set[Place]:
        layers, experts = self.reference.layers, self.reference.experts
        places = [(layer, e) for layer in range(layers) for e in range(experts)]
        budget, best = layers * self.options["experts"][index], list[Place]()
        if index in self.worth:
            eps = min(1.0, self.options["exploit"] + (1 - self.options["exploit"]) * self.rounds / self.options["horizon"])
            count, worth = math.floor(eps * budget + 1e-9), self.worth[index]
            ranked = sorted(places, key=lambda place: -worth[place])
            best = ranked[:count]
            if 0 < count < len(places) and worth[ranked[count - 1]] > 0:
                apart = worth[ranked[count - 1]] - worth[ranked[count]]
                self.margin = min(self.margin, apart / worth[ranked[count - 1]])
        lot_LE = generator(self.options["seed"], "flux roles", self.rounds, index).random((layers, experts))
        others = sorted(set(places) - set(best), key=lambda place: -lot_LE[place])
        return {*best, *others[: budget - len(best)]}

    def utilities(self, task: Task, received: Adapters) -> dict[Place, float]:
        """Tokens at an expert times the root of the mean squared gradient of the samples that have one there."""
        data = self.options["data"][task.index]
        draw = generator(self.options["seed"], "flux probe", self.rounds, task.index)
        chosen = draw.choice(len(data), size=min(self.options["samples"], len(data)), replace=False)
        tokens = np.zeros((self.reference.layers, self.reference.experts))
        squares: dict[Place, list[float]] = {}
        for sample in chosen:
            ids, mask = data[int(sample)]
            adapters = {key: value.clone().requires_grad_() for key, value in received.items()}
            run = self.reference.start(adapters, self.rescalers[task.index], task.cap)
            (self.reference.loss_sum(ids, mask) / int(mask.sum())).backward()
            tokens += run.counts
            for layer, e in np.argwhere(run.counts > 0).tolist():
                own = [adapters[key].grad for key in adapters if key.startswith(f"layers.{layer}.experts.{e}.")]
                square = sum(float(grad.square().sum()) for grad in own if grad is not None)
                # Of a token after which nothing is predicted the last layer's experts have no gradient.
                squares.setdefault((layer, e), []).extend([square] * (square > 0))
        found = {(layer, e): 0.0 for layer in range(self.reference.layers) for e in range(self.reference.experts)}
        return found | {place: tokens[place] * math.sqrt(sum(own) / len(own)) for place, own in squares.items() if own}

    def trains(self, key: str, task: Task) -> bool:
        parts = key.split(".")
        return parts[2] != "experts" or (int(parts[1]), int(parts[3])) in self.tuned[task.index]

    def left(self, task: Task, received: Adapters) -> tuple[str, ...]:
        """Keys that the client does not tune."""
        return tuple(key for key in received if not self.trains(key, task))

    def weight(self, key: str, one: Returned) -> float:
        return super().weight(key, one) if self.trains(key, one.task) else 0.0


class ObservedFlux(Flux):
    """Roles are the package's plan; the gradients are replayed (`replay.py`)."""

    def local(self, task: Task, received: Adapters) -> Trained:
        replay: Any = self.reference
        self.tuned[task.index] = {(layer, e) for layer, e in np.argwhere(replay.updates[task.index].plan.tuned_LE).tolist()}
        own, extra = self.rescalers[task.index], self.extra(task, received)
        return self.reference.train(task, received, own, self.left(task, received), extra=extra)


def close(worth_LE: np.ndarray, theirs: dict[Place, float]) -> bool:
    """Whether the package knows the same utilities."""
    expected_LE = torch.zeros(worth_LE.shape, dtype=torch.float64)
    for place, value in theirs.items():
        expected_LE[place] = value
    return bool(np.allclose(worth_LE, expected_LE.numpy(), rtol=1e-4, atol=1e-9))
