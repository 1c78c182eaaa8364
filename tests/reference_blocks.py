"""FedBE in plain float64: Hugging Face's Llama with further layers, one client after the other, sample by sample.

It shares no code with the package: it is told who takes part, their batches, and the samples of their probes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

Text = tuple[np.ndarray, np.ndarray]
"""Tokens, and which of them are targets."""


@dataclass(frozen=True)
class Task:
    """One client's work in one round; `probe` are its samples where blocks have to be found for it."""

    index: int
    size: int
    blocks: int
    probe: list[Text]
    steps: list[list[Text]]


class Expanded:
    """The expanded model and what the server has; `depth` layers and as many groups as `blocks`."""

    def __init__(self, folder: Path, blocks: int, lr: float, decay: float) -> None:
        config = AutoConfig.from_pretrained(folder)
        given = AutoModelForCausalLM.from_pretrained(folder).double()
        size = config.num_hidden_layers // blocks
        if getattr(config, "layer_types", None):
            config.layer_types = [kind for i, kind in enumerate(config.layer_types) for _ in range(1 + ((i + 1) % size == 0))]
        config.num_hidden_layers += blocks
        self.model: Any = AutoModelForCausalLM.from_config(config).double().eval().requires_grad_(False)
        self.further = [(size + 1) * block + size for block in range(blocks)]
        own = [layer for layer in range(config.num_hidden_layers) if layer not in self.further]
        for place, layer in zip(own, given.model.layers, strict=True):
            self.model.model.layers[place].load_state_dict(layer.state_dict())
        for rest in ("model.embed_tokens", "model.norm", "lm_head"):
            self.model.get_submodule(rest).load_state_dict(given.get_submodule(rest).state_dict())
        for layer in self.further:
            copied = self.model.model.layers[layer]
            copied.load_state_dict(self.model.model.layers[layer - 1].state_dict())
            copied.self_attn.o_proj.weight.zero_()
            copied.mlp.down_proj.weight.zero_()
        self.lr, self.decay = lr, decay
        self.given: dict[int, list[int]] = {}

    def state(self) -> dict[int, dict[str, Tensor]]:
        """What the server has of every further layer."""
        return {n: {k: v.clone() for k, v in self.layer(n).state_dict().items()} for n in self.further}

    def layer(self, index: int) -> Any:
        return self.model.model.layers[index]

    def loss(self, texts: list[Text]) -> Tensor:
        """Mean over the targets of a step."""
        total, count = torch.zeros((), dtype=torch.float64), 0
        for tokens, mask in texts:
            logits = self.model(input_ids=torch.from_numpy(np.array(tokens))[None]).logits[0]
            places = torch.from_numpy(np.flatnonzero(mask))
            total = total + F.cross_entropy(logits[places - 1], torch.from_numpy(np.array(tokens))[places], reduction="sum")
            count += len(places)
        return total / count

    def round(self, tasks: list[Task]) -> None:
        """Clients train from what the server has; the mean of those who trained a block is its next value."""
        before = self.state()
        came: list[tuple[Task, dict[int, dict[str, Tensor]]]] = []
        for task in tasks:
            for index in self.further:
                self.layer(index).load_state_dict(before[index])
            if task.probe:
                self.given[task.index] = self.found(task)
            chosen = self.given.get(task.index, self.further)
            self.train(task, chosen)
            came.append((task, {index: self.state()[index] for index in chosen}))
        for index in self.further:
            trained = [(task.size, own[index]) for task, own in came if index in own]
            whole = sum(size for size, _ in trained)
            after = {name: sum(size * own[name] for size, own in trained) / whole for name in before[index]} if trained else {}
            self.layer(index).load_state_dict(after or before[index])

    def found(self, task: Task) -> list[int]:
        squares = self.squares(task.probe)
        return sorted(sorted(self.further, key=lambda index: -squares[index])[: task.blocks])

    def squares(self, probe: list[Text]) -> dict[int, float]:
        """By further layer, the squared norm of the gradients of what it adds to the residual stream."""
        outputs = {n: [self.layer(n).self_attn.o_proj.weight, self.layer(n).mlp.down_proj.weight] for n in self.further}
        weights = [weight for pair in outputs.values() for weight in pair]
        for weight in weights:
            weight.requires_grad_(True)
        grads = dict(zip(map(id, weights), torch.autograd.grad(self.loss(probe), weights), strict=True))
        for weight in weights:
            weight.requires_grad_(False)
        return {n: sum(float(grads[id(weight)].square().sum()) for weight in pair) for n, pair in outputs.items()}

    def train(self, task: Task, chosen: list[int]) -> None:
        parameters = [p for index in chosen for p in self.layer(index).parameters()]
        for parameter in parameters:
            parameter.requires_grad_(True)
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": self.decay},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, eps=1e-4)
        for texts in task.steps:
            optimizer.zero_grad()
            self.loss(texts).backward()
            optimizer.step()
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
