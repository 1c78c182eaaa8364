"""FFT-MoE the slow way: float64, one client after the other, one sample at a time, one expert at a time.

The model is Hugging Face's Llama or ViT; each feed-forward block becomes FFN(x) + sum_m g_m E_m(x) in a loop. It shares no code
with the package: data, batches, budgets and initial values are given to it. Legend: T token rows, M experts, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

Adapters = dict[str, Tensor]
HALVES = ("inner", "outer")


@dataclass(frozen=True)
class Settings:
    """What a run is told."""

    experts: int
    top_k: int
    auxiliary: str
    coefficient: float = 0.0
    gamma: float = 0.5
    epsilon: float = 0.05
    optimizer: str = "adamw"
    lr: float = 5e-3
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    clip: float | None = None
    micro: int | None = None
    linear: bool = False
    shared: int = 0
    zero: int = 0
    by_sample: bool = False


@dataclass(frozen=True)
class Text:
    """One sequence: tokens, and which of them are targets."""

    tokens: np.ndarray
    mask: np.ndarray

    @property
    def targets(self) -> int:
        return int(self.mask.sum())


@dataclass(frozen=True)
class Image:
    """One image [C, H, W] and its class."""

    pixels: np.ndarray
    label: int
    targets: int = 1
    score: float = 0.0


Sample = Text | Image


@dataclass(frozen=True)
class Task:
    """One client's work in one round: budget, data size, and the samples of every step."""

    index: int
    active: int
    size: int
    steps: list[list[Sample]]


@dataclass
class Running:
    """What the loops read and write while a client's samples pass; `scores` are the router logits since the last clearing, and
    `severities` the scores of the samples that they belong to."""

    adapters: Adapters
    active: int
    used: np.ndarray
    scores: dict[int, list[Tensor]] = field(default_factory=dict)
    severities: dict[int, list[Tensor]] = field(default_factory=dict)
    score: float = 0.0


class DenseReference:
    """The model in float64, and the global adapters; `used` counts what the last round routed, per layer and expert."""

    def __init__(self, folder: Path, settings: Settings, adapters: Adapters) -> None:
        self.images = folder.name.startswith("vit")
        factory: Any = AutoModelForImageClassification if self.images else AutoModelForCausalLM
        self.model: Any = factory.from_pretrained(folder).double().eval().requires_grad_(False)
        self.settings, self.adapters = settings, adapters
        self.layers = self.model.config.num_hidden_layers
        self.used: np.ndarray | None = None
        self.running: Running | None = None
        self.margin = math.inf  # smallest distance between a chosen and the next score: how near routing was to a tie
        for index, layer in enumerate(self.model.base_model.layers):
            layer.mlp = _Beside(layer.mlp, index, self)
        _exact_norms(self.model)

    def pool(self, layer: int, x_TD: Tensor) -> Tensor:
        """sum_m g_m(x) E_m(x), g the softmax over the client's k largest of z = W_R x, E(x) = V gelu(U x)."""
        run = self.running
        assert run is not None
        z_TM, told = self._logits(layer, x_TD, run), self.settings
        run.severities.setdefault(layer, []).append(torch.full((len(x_TD),), run.score, dtype=torch.float64))
        run.scores.setdefault(layer, []).append(z_TM)
        y_TD = []
        for x_D, z_M in zip(x_TD, z_TM, strict=True):
            order = z_M.detach().argsort(descending=True).tolist()
            chosen = order[: run.active]
            if run.active < told.experts + told.zero:
                self.margin = min(self.margin, float((z_M[chosen[-1]] - z_M[order[run.active]]).detach()))
            total = sum(z_M[m].exp() for m in chosen)
            y_D = torch.zeros_like(x_D)
            for m in chosen:
                if m >= told.experts:  # it has a part of the weights, and adds nothing
                    continue
                run.used[layer, m] += 1
                key = f"layers.{layer}.experts.{m}"
                y_D = y_D + z_M[m].exp() / total * self._expert_at(x_D, run.adapters, key)
            for n in range(told.shared):
                y_D = y_D + self._expert(x_D, *_own_rows(layer, n, run.adapters, told.shared))
            y_TD.append(y_D)
        return torch.stack(y_TD)

    def _logits(self, layer: int, x_TD: Tensor, run: Running) -> Tensor:
        """z of every token; of one decision per sample (samples pass one at a time) the same for all."""
        weight_MD = run.adapters[f"layers.{layer}.router.weight"]
        if not self.settings.by_sample:
            return x_TD @ weight_MD.T
        z_M = weight_MD @ (x_TD.sum(0) / len(x_TD))
        if f"layers.{layer}.router_score.weight" in run.adapters:
            z_M = z_M + run.adapters[f"layers.{layer}.router_score.weight"][:, 0] * run.score
        return z_M.expand(len(x_TD), -1)

    def _expert_at(self, x_D: Tensor, adapters: dict[str, Tensor], key: str) -> Tensor:
        return self._expert(x_D, *(adapters[f"{key}.{name}.weight"] for name in HALVES))

    def _expert(self, x_D: Tensor, inner_HD: Tensor, outer_DH: Tensor) -> Tensor:
        h_H = inner_HD @ x_D
        a_H = h_H if self.settings.linear else h_H * 0.5 * (1.0 + torch.erf(h_H / math.sqrt(2.0)))
        return outer_DH @ a_H

    def loss(self, sample: Sample) -> Tensor:
        """Negative log-likelihood, summed over the targets of a sample."""
        return F.cross_entropy(*self.predictions(sample), reduction="sum")

    def predictions(self, sample: Sample) -> tuple[Tensor, Tensor]:
        """Logits and labels of the targets of a sample."""
        if isinstance(sample, Image):
            assert self.running is not None
            self.running.score = sample.score
            logits = self.model(pixel_values=torch.from_numpy(np.array(sample.pixels)).double()[None]).logits
            return logits, torch.tensor([sample.label])
        tokens = torch.from_numpy(np.array(sample.tokens))
        logits = self.model(input_ids=tokens[None], use_cache=False).logits[0]
        places = torch.from_numpy(np.flatnonzero(sample.mask))
        return logits[places - 1], tokens[places]

    def auxiliary(self, target: np.ndarray) -> Tensor:
        """The routing loss of the samples since `scores` was cleared, mean over layers. `target` is q [layers, M]."""
        run, told = self.running, self.settings
        assert run is not None
        losses = []
        for layer, scores in run.scores.items():
            z_TM = torch.cat(scores)
            mean_M = z_TM.softmax(-1).mean(0)
            if told.auxiliary == "global":
                losses.append((mean_M * (mean_M / torch.from_numpy(target[layer])).log()).sum())
                continue
            if told.auxiliary == "degradation":
                price_TM = torch.ones_like(z_TM)
                price_TM[:, told.experts :] = torch.cat(run.severities[layer])[:, None]
                mean_M = (z_TM.softmax(-1) * price_TM).mean(0)
            slots_M = torch.zeros(told.experts + told.zero, dtype=torch.float64)
            for row in z_TM.detach().argsort(-1, descending=True)[:, : run.active]:
                slots_M[row] += 1
            balance = len(slots_M) * (slots_M / slots_M.sum() * mean_M).sum()
            if told.auxiliary == "adaptive":
                spread = float(((slots_M - slots_M.mean()) ** 2).mean().sqrt() / slots_M.mean())
                balance = balance * (1.0 + spread) * (told.top_k / run.active) ** told.gamma
            losses.append(balance)
        return told.coefficient * torch.stack(losses).mean()

    def target(self) -> np.ndarray:
        """q: what the last round used too little; uniform before there was one."""
        shape = (self.layers, self.settings.experts)
        if self.used is None:
            return np.full(shape, 1 / shape[1])
        share = self.used / self.used.sum(1, keepdims=True)
        q = np.maximum(0, 1 / shape[1] - share) + self.settings.epsilon / shape[1]
        return q / q.sum(1, keepdims=True)

    def round(self, tasks: Sequence[Task]) -> None:
        """All clients from the same global values; their mean, weighted by data size, is the next global value."""
        target, used = self.target(), np.zeros((self.layers, self.settings.experts))
        whole = sum(task.size for task in tasks)
        mean = {key: torch.zeros_like(value) for key, value in self.adapters.items()}
        for task in tasks:
            for key, value in self._train(task, target, used).items():
                mean[key] += task.size / whole * value
        self.adapters, self.used = mean, used

    def _train(self, task: Task, target: np.ndarray, used: np.ndarray) -> Adapters:
        adapters = {key: value.clone().requires_grad_() for key, value in self.adapters.items()}
        self.running = Running(adapters, task.active, used)
        parameters = list(adapters.values())
        optimizer = self._optimizer(parameters)
        for samples in task.steps:
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
            self._backward(self.running, samples, target)
            self._clip(parameters)
            optimizer.step()
        return {key: value.detach() for key, value in adapters.items()}

    def _backward(self, run: Running, samples: list[Sample], target: np.ndarray) -> None:
        targets = sum(sample.targets for sample in samples)
        rows = sum(map(self._rows, samples))
        size = self.settings.micro or len(samples)
        for first in range(0, len(samples), size):
            part = samples[first : first + size]
            run.scores.clear()
            run.severities.clear()
            loss = torch.stack([self.loss(sample) for sample in part]).sum() / targets
            if self.settings.auxiliary != "none":
                loss = loss + self.auxiliary(target) * sum(map(self._rows, part)) / rows
            loss.backward()

    def _rows(self, sample: Sample) -> int:
        """What the blocks see of a sample: its tokens; of an image the patches and the class token."""
        if isinstance(sample, Text):
            return len(sample.tokens)
        return (sample.pixels.shape[1] // self.model.config.patch_size) ** 2 + 1

    def _clip(self, parameters: list[Tensor]) -> None:
        norm = math.sqrt(sum(float(parameter.grad.square().sum()) for parameter in parameters if parameter.grad is not None))
        for parameter in parameters:
            if self.settings.clip is not None and norm > self.settings.clip:
                assert parameter.grad is not None
                parameter.grad *= self.settings.clip / norm

    def _optimizer(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        told = self.settings
        if told.optimizer == "sgd":
            return torch.optim.SGD(parameters, told.lr, momentum=told.momentum, weight_decay=told.weight_decay)
        return torch.optim.AdamW(parameters, told.lr, eps=told.eps, weight_decay=told.weight_decay)

    @torch.no_grad()
    def evaluate(self, samples: Sequence[Sample], active: int) -> float:
        """Mean loss per target with `active` experts per token."""
        self.running = Running(self.adapters, active, np.zeros((self.layers, self.settings.experts)))
        return sum(float(self.loss(sample)) for sample in samples) / sum(sample.targets for sample in samples)


def _own_rows(layer: int, n: int, adapters: Adapters, shared: int) -> tuple[Tensor, Tensor]:
    """U and V of a shared expert, which lie side by side."""
    inner, outer = (adapters[f"layers.{layer}.shared_experts.{name}.weight"] for name in HALVES)
    width = len(inner) // shared
    own = slice(n * width, (n + 1) * width)
    return inner[own], outer[:, own]


class _Beside(nn.Module):
    """A feed-forward block and the loop beside it."""

    def __init__(self, block: nn.Module, index: int, reference: DenseReference) -> None:
        super().__init__()
        self.block, self.index = block, index
        self._reference = [reference]  # in a list: no submodule

    def forward(self, x_BSD: Tensor) -> Tensor:
        y_TD = self._reference[0].pool(self.index, x_BSD.flatten(0, 1))
        out_BSD: Tensor = self.block(x_BSD)
        return out_BSD + y_TD.view_as(x_BSD)


def _exact_norms(model: nn.Module) -> None:
    """Hugging Face's RMSNorm computes in float32 whatever it is given; torch's does not."""
    for path, module in list(model.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            norm = nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon, dtype=torch.float64)
            norm.weight = module.weight
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, norm)
