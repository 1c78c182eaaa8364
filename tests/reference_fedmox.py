"""FedMox the slow way: float64, pseudo-labels of the model as it was received, one client after the other, then the server.

It goes on where `reference_dense.py` ends. Legend: T token rows, M experts, V classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from reference_dense import Adapters, DenseReference, Image, Running, Sample, Task
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """What a run is told; `alpha` is the share of the old model in the soft mixture."""

    threshold: float
    weight: float
    alpha: float
    server_lr: float


@dataclass
class Teacher:
    """The classes that the received model is sure of, by the address of an image; None: it is not."""

    classes: dict[int, int | None] = field(default_factory=dict)


class FedMox(DenseReference):
    """Hard top-1 experts with a straight-through gate, clients without labels, a server with labels."""

    def __init__(self, *args: object, rule: Rule) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.rule, self.teacher = rule, None
        self.taught = self.untaught = 0

    teacher: Teacher | None

    def pool(self, layer: int, x_TD: Tensor) -> Tensor:
        """p / stopgrad(p) times the best expert, p the softmax of z = W_R x over all."""
        run = self.running
        assert run is not None
        y_TD = []
        for x_D in x_TD:
            z_M = run.adapters[f"layers.{layer}.router.weight"] @ x_D
            first, *others = z_M.detach().argsort(descending=True).tolist()
            if others:
                self.margin = min(self.margin, float((z_M[first] - z_M[others[0]]).detach()))
            run.used[layer, first] += 1
            p = z_M.exp()[first] / z_M.exp().sum()
            y_TD.append(p / p.detach() * self._expert_at(x_D, run.adapters, f"layers.{layer}.experts.{first}"))
        return torch.stack(y_TD)

    def loss(self, sample: Sample) -> Tensor:
        """Cross-entropy at the server; at a client that of its pseudo-label, or nothing."""
        if self.teacher is None:
            return super().loss(sample)
        logits, _ = self.predictions(sample)
        label = self.teacher.classes[id(sample)]
        return logits.sum() * 0.0 if label is None else self.rule.weight * F.cross_entropy(logits, torch.tensor([label]))

    @torch.no_grad()
    def _ask(self, samples: Sequence[Image], active: int) -> Teacher:
        """What the global model says now."""
        self.running, found = Running(self.adapters, active, np.zeros((self.layers, self.settings.experts))), Teacher()
        for sample in samples:
            p_V = self.predictions(sample)[0][0].softmax(0)
            best = int(p_V.argmax())
            self.margin = min(self.margin, abs(float(p_V[best]) - self.rule.threshold))
            found.classes[id(sample)] = best if float(p_V[best]) >= self.rule.threshold else None
        return found

    def mixed(self, tasks: Sequence[Task], server: Task) -> None:
        """A round: clients, soft mixture, and the server's own steps."""
        before, whole = self.adapters, sum(task.size for task in tasks)
        mean = {key: torch.zeros_like(value) for key, value in before.items()}
        used, none = np.zeros((self.layers, self.settings.experts)), np.zeros(0)
        for task in tasks:
            self.teacher = self._ask([image for step in task.steps for image in step], task.active)  # type: ignore[misc]
            known = [label is not None for label in self.teacher.classes.values()]
            self.taught, self.untaught = self.taught + sum(known), self.untaught + len(known) - sum(known)
            for key, value in self._train(task, none, used).items():
                mean[key] += task.size / whole * value
        self.used, self.teacher = used, None
        alpha = self.rule.alpha
        self.adapters = {key: alpha * value + (1 - alpha) * mean[key] for key, value in before.items()}
        self.serve(server)

    def serve(self, server: Task) -> None:
        """Steps on public images with their labels."""
        settings = self.settings
        self.settings = replace(settings, lr=self.rule.server_lr)
        self.adapters: Adapters = self._train(server, np.zeros(0), np.zeros((self.layers, settings.experts)))
        self.settings = settings
