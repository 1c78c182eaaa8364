"""RaFFM in plain float64: the dense model with sliced matrices, one client after the other, means over holders in loops.

Of the package it gets data, batches and budgets; channels are sorted, cut and put together again here. Legend: T token rows,
D width, F channels of a group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reference import Adapters
from reference_dense import DenseReference, Running, Sample, Settings, Task
from reference_methods import Returned
from reference_sub_models import Holders
from torch import Tensor, nn

from fedmoe_ds.randomness import generator

Widths = dict[int, list[int]]
"""By client, how many groups of every layer it holds."""


def random_widths(seed: int, round_index: int, clients: list[int], space: list[int], full: int, layers: int) -> Widths:
    """One client gets everything, the next the smallest, the others draw; `space` is in ascending order."""
    turns = generator(seed, "sub-models", round_index).permutation(len(clients)).tolist()
    found = {clients[turns[0]]: [full] * layers}
    if len(clients) > 1:
        found[clients[turns[1]]] = [space[0]] * layers
    for turn in turns[2:]:
        draw = generator(seed, "sub-model widths", round_index, clients[turn]).choice(space, layers)
        found[clients[turn]] = [int(width) for width in draw]
    return found


def sorted_channels(block: nn.Module) -> list[int]:
    """Channels of a block by the magnitudes of all numbers that are theirs, largest first."""
    inner, outer = matrices(block)
    sums = [sum(float(w[j].abs().sum()) for w in inner) + float(outer[:, j].abs().sum()) for j in range(len(inner[0]))]
    return sorted(range(len(sums)), key=lambda j: -sums[j])


def matrices(block: Any) -> tuple[list[Tensor], Tensor]:
    if hasattr(block, "fc1"):
        return [block.fc1.weight], block.fc2.weight
    return [block.gate_proj.weight, block.up_proj.weight], block.down_proj.weight


class _Biases(nn.Module):
    """What of a block is left without its channels."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.bias = block.fc2.bias if hasattr(block, "fc2") else None

    def forward(self, x_BSD: Tensor) -> Tensor:
        return torch.zeros_like(x_BSD) if self.bias is None else torch.zeros_like(x_BSD) + self.bias


class RaFFMReference(DenseReference):
    """The groups of every block as matrices of their own; `missing` as the method has it."""

    def __init__(self, folder: Path, settings: Settings, missing: str) -> None:
        super().__init__(folder, settings, {})
        self.missing, self.held = missing, list[int]()
        self.bias: list[Tensor] = []
        for index, layer in enumerate(self.model.base_model.layers):
            block = layer.mlp.block
            order = torch.tensor(sorted_channels(block))
            inner, outer = matrices(block)
            for e, channels in enumerate(order.chunk(settings.experts)):
                key = f"layers.{index}.experts.{e}"
                whole = torch.cat([weight[channels] for weight in inner])
                names = ("inner", "outer") if self.images else ("gate_up", "down")
                self.adapters |= {f"{key}.{names[0]}.weight": whole, f"{key}.{names[1]}.weight": outer[:, channels].clone()}
            self.bias.append(block.fc1.bias[order] if self.images else torch.zeros(len(order), dtype=torch.float64))
            layer.mlp.block = _Biases(block)

    def pool(self, layer: int, x_TD: Tensor) -> Tensor:
        run = self.running
        assert run is not None
        groups = range(self.held[layer])
        return sum((self._group(layer, e, x_TD, run.adapters) for e in groups), torch.zeros_like(x_TD))

    def _group(self, layer: int, e: int, x_TD: Tensor, adapters: Adapters) -> Tensor:
        key = f"layers.{layer}.experts.{e}"
        if self.images:
            bias_F = self.bias[layer].chunk(self.settings.experts)[e]
            h_TF = x_TD @ adapters[f"{key}.inner.weight"].T + bias_F
            return (h_TF * 0.5 * (1.0 + torch.erf(h_TF / math.sqrt(2.0)))) @ adapters[f"{key}.outer.weight"].T
        gate_TF, up_TF = (x_TD @ adapters[f"{key}.gate_up.weight"].T).chunk(2, dim=1)
        return (gate_TF * gate_TF.sigmoid() * up_TF) @ adapters[f"{key}.down.weight"].T

    def round_of(self, tasks: Sequence[Task], widths: Widths) -> None:
        trained = {task.index: self._trained(task, widths[task.index]) for task in tasks}
        whole = sum(task.size for task in tasks)
        for key, old in self.adapters.items():
            layer, e = int(key.split(".")[1]), int(key.split(".")[3])
            holders = [task for task in tasks if e < widths[task.index][layer]]
            if not holders:
                continue
            total = sum((task.size * trained[task.index][key] for task in holders), torch.zeros_like(old))
            self.adapters[key] = total / (whole if self.missing == "zero" else sum(task.size for task in holders))

    def _trained(self, task: Task, held: list[int]) -> Adapters:
        self.held = held
        mine = [key for key in self.adapters if int(key.split(".")[3]) < held[int(key.split(".")[1])]]
        adapters = {key: value.clone() for key, value in self.adapters.items()}
        own = [adapters[key].requires_grad_() for key in mine]
        self.running = Running(adapters, 0, np.zeros(0))
        optimizer = self._optimizer(own)
        for samples in task.steps:
            optimizer.zero_grad()
            self._backward(self.running, samples, np.zeros(0))
            self._clip(own)
            optimizer.step()
        return {key: value.detach() for key, value in adapters.items()}

    @torch.no_grad()
    def evaluate(self, samples: Sequence[Sample], active: int) -> float:
        """Mean loss per target of the sub-model of the first groups."""
        self.held = [active] * self.layers
        return super().evaluate(samples, active)


class RaFFM(Holders):
    """In the place of a run's rounds, from its gradients; option: missing."""

    def holds(self, one: Returned, layer: int, expert: int) -> bool:
        return expert < one.task.cap

    def mean(self, key: str, old: Tensor, returned: list[Returned]) -> Tensor | None:
        found = super().mean(key, old, returned)
        if found is None or self.options["missing"] != "zero":
            return found
        return found * sum(self.weight(key, one) for one in returned) / sum(one.task.samples for one in returned)
