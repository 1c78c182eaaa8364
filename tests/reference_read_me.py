"""Read-ME the slow way: float64, one client, sequence and token at a time, the dense Llama's blocks cut up by loops.

It shares no code with the package: which channels are permanent, the masks of experts and all initial values are given to it.
Legend: S positions, T token rows, W width of the router, E experts, F channels, D model width.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from reference import Adapters, Reference, Running, Settings, Task, _exact_norms
from reference_methods import EmbracingFL, Returned
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

ROUTER = "model.pre_gate."


class ReadMeReference(Reference):
    """The dense model with the masks of its tokens' experts; `dense` and `converted` are folders."""

    def __init__(self, dense: Path, converted: Path, settings: Settings) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(dense).double().eval().requires_grad_(False)
        self.settings, self.margin = settings, math.inf
        tensors = {name: value.double() for name, value in load_file(converted / "model.safetensors").items()}
        self.masks_LEF = tensors["pre_gate.masks_LEF"]
        self.layers, self.experts, self.top_k = len(self.masks_LEF), self.masks_LEF.shape[1], 1
        self.running, self.objective, self.held = None, None, None
        self.features: list[Tensor] = []
        self._read = torch.empty(0)
        self.model.get_output_embeddings().register_forward_pre_hook(self._note)
        self.teaches = False
        self.route: list[int] = []
        self.targets: list[Tensor] = []  # by sequence and layer, of the pass
        self.decisions: list[Tensor] = []
        for index, layer in enumerate(self.model.model.layers):
            permanent = tensors[f"model.layers.{index}.mlp.shared_expert.gate_proj.weight"]
            layer.mlp = _Cut(layer.mlp, index, permanent, self)
        _exact_norms(self.model)

    def predictions(self, tokens: np.ndarray, targets: np.ndarray) -> tuple[Tensor, Tensor]:
        assert self.running is not None
        z_SE = self.decide(self.running.adapters, tokens)
        best_SE = z_SE.detach().sort(descending=True).values
        self.margin = min(self.margin, float((best_SE[:, 0] - best_SE[:, 1]).min()))
        self.route = z_SE.detach().argmax(-1).tolist()
        if self.teaches:
            self.decisions.append(z_SE)
        return super().predictions(tokens, targets)

    def decide(self, adapters: Adapters, tokens: np.ndarray) -> Tensor:
        """The router's logits of every token of a sequence, one layer of two heads."""
        weights = {key.removeprefix(ROUTER): value for key, value in adapters.items() if key.startswith(ROUTER)}
        x_SW = weights["embedding"][torch.from_numpy(np.array(tokens))]
        inner = _normed(x_SW) @ weights["attention_in_0"].T
        width = x_SW.shape[1]
        half, rows = width // 2, []
        for t in range(len(x_SW)):
            parts = []
            for head in (0, 1):
                at = slice(head * half, (head + 1) * half)
                q, k, v = (inner[:, i * width : (i + 1) * width][:, at] for i in range(3))
                share = torch.stack([q[t] @ k[s] / math.sqrt(half) for s in range(t + 1)]).softmax(0)
                parts.append(sum(share[s] * v[s] for s in range(t + 1)))
            rows.append(torch.cat(parts))  # type: ignore[arg-type]
        x_SW = x_SW + torch.stack(rows) @ weights["attention_out_0"].T
        x_SW = x_SW + F.silu(_normed(x_SW) @ weights["inner_0"].T) @ weights["outer_0"].T
        return _normed(x_SW) @ weights["head"].T

    def auxiliary(self) -> Tensor:
        """The router's loss over the sequences of the pass, summed over layers; without a turn of it nothing."""
        if not self.teaches:
            return torch.zeros((), dtype=torch.float64)
        z_TE, total = torch.cat(self.decisions), torch.zeros((), dtype=torch.float64)
        for layer in range(self.layers):
            rows = [row for place, targets in enumerate(self.targets) if place % self.layers == layer for row in targets]
            for z_E, s_E in zip(z_TE, rows, strict=True):
                log_E = z_E.log_softmax(-1)
                hard = 0.5 * -log_E[int(s_E.argmax())] + 0.5 * -log_E.mean()
                total = total + (0.75 * hard - 0.25 * (s_E.softmax(-1) * log_E).sum()) / len(rows)
        self.decisions, self.targets = [], []
        return total

    def score(self, layer: int, a_F: Tensor) -> Tensor:
        """How many of a token's largest channels each expert has."""
        count = int(self.masks_LEF[layer, 0].sum())
        order = a_F.argsort(descending=True).tolist()
        found = torch.zeros(self.experts, dtype=torch.float64)
        for cut in (count - 1, count * 4 // 5, count * 3 // 5, count * 2 // 5, count // 5):
            for channel in order[:cut]:
                found += self.masks_LEF[layer, :, channel]
        # Whole numbers so far: equal ones stay equal, and the first of them is the best.
        return found * 10 / 3 / count

    def evaluate(self, adapters: Adapters, rescaler: Tensor, cap: int, sequences: Any) -> float:
        self.teaches = False
        return super().evaluate(adapters, rescaler, cap, sequences)


class _Cut(nn.Module):
    """Permanent channels of a dense block, and those of the token's expert."""

    def __init__(self, block: Any, index: int, permanent_PD: Tensor, reference: ReadMeReference) -> None:
        super().__init__()
        gate_FD = block.gate_proj.weight
        self.permanent_F = (gate_FD[:, None] == permanent_PD).all(-1).any(1).double()
        self.block, self.index = block, index
        self._reference = [reference]

    def forward(self, x_BSD: Tensor) -> Tensor:
        reference, x_SD = self._reference[0], x_BSD[0]
        run = reference.running
        assert isinstance(run, Running) and len(x_BSD) == 1
        a_SF = F.silu(self.block.gate_proj(x_SD)) * self.block.up_proj(x_SD)
        if reference.teaches:
            reference.targets.append(torch.stack([reference.score(self.index, a_F) for a_F in a_SF.detach()]))
        y_SD = self.block.down_proj(a_SF * self.permanent_F)
        rows = []
        for x_D, y_D, expert in zip(x_SD, y_SD, reference.route, strict=True):
            run.counts[self.index, expert] += 1
            key = f"layers.{self.index}.experts.{expert}"
            gate_K, up_K = (run.adapters[f"{key}.gate_up.weight"] @ x_D).chunk(2)
            rows.append(y_D + run.adapters[f"{key}.down.weight"] @ (F.silu(gate_K) * up_K))
        return torch.stack(rows)[None]


def _normed(x_SW: Tensor) -> Tensor:
    return x_SW / (x_SW.square().mean(-1, keepdim=True) + 1e-6).sqrt()


class ReadMe(EmbracingFL):
    """Turns: the router in every second round, else experts, which weigh by the rows that they served."""

    every = 2
    turn = 0

    def round(self, tasks: list[Task], fresh: Adapters) -> None:
        self.turn += 1
        if isinstance(self.reference, ReadMeReference):
            self.reference.teaches = self.turn % self.every == 0
        super().round(tasks, fresh)

    def trains(self, key: str, task: Task) -> bool:
        return key.startswith(ROUTER) == (self.turn % self.every == 0)

    def weight(self, key: str, one: Returned) -> float:
        parts = key.split(".")
        if not self.trains(key, one.task) or parts[2] != "experts":
            return super().weight(key, one)
        return float(one.trained.counts[int(parts[1]), int(parts[3])])
