"""Split-Mix and SHEFL in plain float64: one base model after the other, one number after the other.

Legend: T token rows, D width, M base models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from reference import Trained
from reference_dense import Adapters, DenseReference, Running, Sample, Task
from reference_methods import FedIT, Returned
from torch import Tensor

from fedmoe_ds.randomness import generator


def base_models(seed: int, count: int, round_index: int, budgets: dict[int, int]) -> dict[int, list[int]]:
    """Which of `count` base models each client trains, by its index; `budgets` are those of the round's clients."""
    rounds_before, found = round_index - 1, {}
    for place, index in enumerate(sorted(budgets)):
        turn = rounds_before * len(budgets) + place
        listed = generator(seed, "base models", turn // count).permutation(count).tolist()
        first = listed[turn % count]
        others = [base for base in range(count) if base != first]
        more = generator(seed, "more base models", round_index, index).choice(others, budgets[index] - 1, replace=False)
        found[index] = sorted([first, *map(int, more)])
    return found


def largest(change: Tensor, density: Fraction) -> Tensor:
    """The change with all numbers set to zero but the ceil(density n) of largest magnitude, of equal ones the first."""
    numbers = change.flatten().tolist()
    order = sorted(range(len(numbers)), key=lambda place: (-abs(numbers[place]), place))
    kept = set(order[: math.ceil(density * len(numbers))])
    values = [number if place in kept else 0.0 for place, number in enumerate(numbers)]
    return torch.tensor(values, dtype=change.dtype).view(change.shape)


class EnsembleReference(DenseReference):
    """Options: kappa, and rho and U of the density."""

    def __init__(self, *args: Any, kappa: float = 0.0, density: str = "1", upload: str | None = None) -> None:
        super().__init__(*args)
        self.kappa, self.rho, self.upload = kappa, Fraction(density), None if upload is None else Fraction(upload)
        self.base, self._own = 0, list[int]()
        self.bases: dict[int, list[int]] = {}

    def pool(self, layer: int, x_TD: Tensor) -> Tensor:
        """The running base model's own expert, and no other."""
        run = self.running
        assert run is not None
        return torch.stack([self._expert_at(x_D, run.adapters, f"layers.{layer}.experts.{self.base}") for x_D in x_TD])

    def round_of(self, tasks: Sequence[Task], bases: dict[int, list[int]]) -> None:
        """All clients from the same global values; a base model moves by the mean of what its clients send."""
        trained, self.bases = dict[int, Adapters](), bases
        for task in tasks:
            self._own = bases[task.index]
            trained[task.index] = self._train(task, np.zeros(0), np.zeros(0))
        for key, old in self.adapters.items():
            holders = [task for task in tasks if self._is_of(key, bases[task.index])]
            shares = [self._share(task) for task in holders]
            sent = [largest(trained[task.index][key] - old, self._density(task)) for task in holders]
            for share, change in zip(shares, sent, strict=True):
                self.adapters[key] = self.adapters[key] + share / sum(shares) * change

    def _train(self, task: Task, target: np.ndarray, used: np.ndarray) -> Adapters:
        adapters = {key: value.clone() for key, value in self.adapters.items()}
        own = [adapters[key].requires_grad_() for key in adapters if self._is_of(key, self._own)]
        self.running = Running(adapters, 1, used)
        optimizer = self._optimizer(own)
        for samples in task.steps:
            optimizer.zero_grad()
            for base in self._own:
                self.base = base
                self._backward(self.running, samples, target)
            self._clip(own)
            optimizer.step()
        return {key: value.detach() for key, value in adapters.items()}

    def _is_of(self, key: str, bases: list[int]) -> bool:
        parts = key.split(".")
        return parts[2] == "experts" and int(parts[3]) in bases

    def _share(self, task: Task) -> float:
        return float(task.size * (len(self.bases[task.index]) / self.settings.experts) ** self.kappa)

    def _density(self, task: Task) -> Fraction:
        return self.rho if self.upload is None else min(self.rho, self.upload / len(self.bases[task.index]))

    @torch.no_grad()
    def evaluate(self, samples: Sequence[Sample], active: int) -> float:
        """Mean loss per target of the mean of the logits of the first `active` base models."""
        self.running, total = Running(self.adapters, 1, np.zeros(0)), 0.0
        for sample in samples:
            logits, labels = [], torch.empty(0)
            for base in range(active):
                self.base = base
                found, labels = self.predictions(sample)
                logits.append(found)
            total += float(F.cross_entropy(torch.stack(logits).mean(0), labels, reduction="sum"))
        return total / sum(sample.targets for sample in samples)


class ObservedSplitMix(FedIT):
    """Who trains which base models is the package's plan; options: kappa, rho, upload (SHEFL)."""

    frozen = ("router.weight",)

    def trains(self, key: str, task: Any) -> bool:
        parts, replay = key.split("."), self.reference
        bases: list[int] = replay.updates[task.index].plan.tolist()  # type: ignore[attr-defined]
        return parts[2] == "experts" and int(parts[3]) in bases

    def local(self, task: Any, received: Adapters) -> Trained:
        others = tuple(key for key in received if not self.trains(key, task))
        return self.reference.train(task, received, self.rescalers[task.index], others, extra=self.extra(task, received))

    def train(self, task: Any) -> Returned:
        found, bases = super().train(task), self._bases(task)
        density = min(Fraction(1), Fraction(self.options.get("upload", "9")) / bases)
        for key, value in found.trained.adapters.items():
            received = found.received[key]
            found.trained.adapters[key] = received + largest(value - received, density)
        return found

    def _bases(self, task: Any) -> int:
        return len(self.reference.updates[task.index].plan)  # type: ignore[attr-defined]

    def weight(self, key: str, one: Returned) -> float:
        share = (self._bases(one.task) / self.reference.experts) ** float(self.options.get("kappa", 0.0))
        return super().weight(key, one) * share if self.trains(key, one.task) else 0.0
