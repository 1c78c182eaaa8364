"""Local training the slow way: float64, one client after the other, one sequence at a time, one expert at a time.

The model is Hugging Face's OLMoE with its mixture blocks replaced by loops; LoRA is written out; torch does the gradients and
the optimizer. It shares no code with the package: data, batches and initial values are given to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

Adapters = dict[str, Tensor]
GATE_UP, DOWN = "gate_up", "down"


@dataclass(frozen=True)
class Settings:
    """What a run is told; names as in the configuration."""

    scale: float
    rescaler: str = "none"  # none, static, client, layer
    optimizer: str = "adamw"
    lr: float = 5e-3
    schedule: str = "constant"
    warmup: float = 0.0
    weight_decay: float = 0.0
    momentum: float = 0.0
    eps: float = 1e-8
    clip: float | None = 1.0
    balance: float = 0.0
    z: float = 0.0
    micro: int | None = None


@dataclass(frozen=True)
class Task:
    """One client's work in one round: its cap, size, and for every step the (tokens, targets) of each sequence.

    Further budgets: `rank` LoRA rows, or those in `sketch`, `experts` per layer that a batch may train, and `layers`.
    """

    index: int
    cap: int
    samples: int
    steps: list[list[tuple[np.ndarray, np.ndarray]]]
    rank: int | None = None
    sketch: list[int] | None = None
    experts: int | None = None
    layers: int | None = None


Extra = Callable[[Adapters], Tensor]
"""A term that is added to the loss of every step."""
Select = Callable[[int, np.ndarray], set[int]]
"""(layer, router scores of all tokens of a batch [T, E]) -> the experts that the batch trains."""


@dataclass
class Running:
    """What the loops read and write while a client's sequences pass; `active` names the trained experts of each layer, `scores`
    are the router's, added up over tokens."""

    adapters: Adapters
    rescalers: list[Tensor]
    cap: int
    factor: float
    counts: np.ndarray
    scores: np.ndarray
    scale: float
    logits: dict[int, list[Tensor]] = field(default_factory=dict)
    active: dict[int, set[int]] | None = None


@dataclass
class Trained:
    """What a client ends a round with; `rates` is the sum of its learning rates, `loss` the mean of its steps' losses, and
    `first_loss` that of its first step."""

    adapters: Adapters
    rescaler: Tensor
    counts: np.ndarray
    tokens: int
    rates: float
    loss: float = math.nan
    first_loss: float = math.nan


class Reference:
    """The model in float64.

    Args:
        folder: a saved Hugging Face OLMoE.
    """

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder).double().eval().requires_grad_(False)
        self.settings = settings
        self.top_k = self.model.config.num_experts_per_tok
        self.experts, self.layers = self.model.config.num_experts, self.model.config.num_hidden_layers
        self.running: Running | None = None
        # In the place of cross-entropy: (logits, right tokens) of all targets of a step -> what is minimised, summed over them.
        self.objective: Callable[[Tensor, Tensor], Tensor] | None = None
        self.features: list[Tensor] = []  # what the head read of the targets of a pass, sequence by sequence
        self._read = torch.empty(0)
        self.model.get_output_embeddings().register_forward_pre_hook(self._note)
        self.margin = math.inf  # smallest distance between a chosen and the next score: how near routing was to a tie
        self.held: np.ndarray | None = None  # bool [L, E]: the experts that tokens may go to
        for index, layer in enumerate(self.model.model.layers):
            layer.mlp = _Block(layer.mlp, index, self)
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                getattr(layer.self_attn, name).register_forward_hook(self._lora_hook(f"layers.{index}.attention.{name}"))
        _exact_norms(self.model)

    def _lora_hook(self, key: str) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor | None:
            assert self.running is not None
            adapters = self.running.adapters
            if f"{key}.lora_A" not in adapters:
                return None
            return output + self.running.scale * (inputs[0] @ adapters[f"{key}.lora_A"].T) @ adapters[f"{key}.lora_B"].T

        return hook

    def _note(self, module: nn.Module, inputs: tuple[Tensor]) -> None:
        self._read = inputs[0]

    def mixture(self, layer: int, gate_ED: Tensor, w13_EFD: Tensor, w2_EDF: Tensor, x_TD: Tensor) -> Tensor:
        """s * sum_j p_j E_j(x) over the `cap` experts with the largest p = softmax(W x).

        No gradient passes through an expert that is not active: not to its adapters, its input or the router.
        """
        run = self.running
        assert run is not None
        logits_TE = x_TD @ run.adapters.get(f"layers.{layer}.router.weight", gate_ED).T
        run.logits.setdefault(layer, []).append(logits_TE)
        probs_TE = logits_TE.softmax(-1)
        run.scores[layer] += probs_TE.detach().sum(0).numpy()
        chosen_TK = self._chosen(layer, probs_TE.detach())
        if self.held is not None:  # a router without the rows of other experts
            probs_TE = logits_TE.masked_fill(~torch.from_numpy(self.held[layer]), -torch.inf).softmax(-1)
        y_TD = torch.zeros_like(x_TD)
        for expert in range(self.experts):
            rows = (chosen_TK == expert).any(1).nonzero().squeeze(1)
            if len(rows) == 0:
                continue
            run.counts[layer, expert] += len(rows)
            key = f"layers.{layer}.experts.{expert}"
            middle = self._adapted(x_TD[rows], w13_EFD[expert], f"{key}.{GATE_UP}")
            gate, up = middle.chunk(2, dim=-1)
            out = probs_TE[rows, expert, None] * self._adapted(F.silu(gate) * up, w2_EDF[expert], f"{key}.{DOWN}")
            if run.active is not None and expert not in run.active[layer]:
                out = out.detach()
            y_TD = y_TD.index_add(0, rows, out)
        return y_TD * run.rescalers[layer] * run.factor

    def _chosen(self, layer: int, probs_TE: Tensor) -> Tensor:
        """The experts of every token: the best `cap` of those that may be chosen."""
        assert self.running is not None
        may_E = torch.ones(self.experts, dtype=torch.bool) if self.held is None else torch.from_numpy(self.held[layer])
        ranked_TE, order_TE = probs_TE.masked_fill(~may_E, -1.0).sort(descending=True)
        count, most = min(self.running.cap, int(may_E.sum())), int(may_E.sum())
        if count < most:
            self.margin = min(self.margin, float((ranked_TE[:, count - 1] - ranked_TE[:, count]).min()))
        return order_TE[:, :count]

    def _adapted(self, x: Tensor, weight: Tensor, key: str) -> Tensor:
        assert self.running is not None
        adapters = self.running.adapters
        y = x @ adapters.get(f"{key}.weight", weight).T
        if f"{key}.lora_A" in adapters:
            y = y + self.running.scale * (x @ adapters[f"{key}.lora_A"].T) @ adapters[f"{key}.lora_B"].T
        return y

    def loss_sum(self, tokens: np.ndarray, targets: np.ndarray) -> Tensor:
        """Negative log-likelihood of one sequence, summed over its targets."""
        return F.cross_entropy(*self.predictions(tokens, targets), reduction="sum")

    def predictions(self, tokens: np.ndarray, targets: np.ndarray) -> tuple[Tensor, Tensor]:
        """Logits and right tokens of one sequence's targets."""
        logits = self.model(input_ids=torch.from_numpy(np.array(tokens))[None], use_cache=False).logits[0]
        places = torch.from_numpy(np.flatnonzero(targets))
        self.features.append(self._read[0][places - 1])
        return logits[places - 1], torch.from_numpy(np.array(tokens))[places]

    def auxiliary(self) -> Tensor:
        """Switch's load balance and ST-MoE's z-loss over the sequences since `logits` was cleared, mean over layers."""
        assert self.running is not None
        total = []
        for layer, logits in self.running.logits.items():
            logits_TE = torch.cat(logits)
            probs_TE = logits_TE.softmax(-1)
            routed = torch.zeros(self.experts, dtype=torch.float64)
            for row in self._chosen(layer, probs_TE.detach()):
                routed[row] += 1
            balance = self.experts * (routed / routed.sum() * probs_TE.mean(0)).sum()
            z = logits_TE.logsumexp(-1).square().mean()
            total.append(self.settings.balance * balance + self.settings.z * z)
        return torch.stack(total).mean()

    def start(self, adapters: Adapters, rescaler: Tensor, cap: int, scale: float = 1.0) -> Running:
        """Begin a client: `rescaler` has one entry, or one per layer; `scale` is a factor on the LoRA scale."""
        factor = self.top_k / cap if self.settings.rescaler == "static" else 1.0
        rescalers = [rescaler[layer if len(rescaler) > 1 else 0] for layer in range(self.layers)]
        counts, scores = (np.zeros((self.layers, self.experts)) for _ in range(2))
        self.running = Running(adapters, rescalers, cap, factor, counts, scores, self.settings.scale * scale)
        return self.running

    def train(
        self,
        task: Task,
        start: Adapters,
        rescaler: Tensor,
        frozen: Sequence[str] = (),
        scale: float = 1.0,
        extra: Extra | None = None,
        select: Select | None = None,
    ) -> Trained:
        """One client's local training from the values that it received; keys that end like one in `frozen` stay."""
        adapters = {key: value.clone().requires_grad_(not key.endswith(tuple(frozen))) for key, value in start.items()}
        own = rescaler.clone().requires_grad_()
        learns = self.settings.rescaler in ("client", "layer")
        decayed = [value for value in adapters.values() if value.requires_grad]
        others = [own] if learns else []
        optimizer = self._optimizer(decayed, others)
        run = self.start(adapters, own, task.cap, scale)
        tokens, rates, losses = 0, 0.0, list[float]()
        for step, sequences in enumerate(task.steps):
            for parameter in (*decayed, *others):
                parameter.grad = torch.zeros_like(parameter)
            if select is not None:
                run.active = self._survey(run, sequences, select)
            count, loss = self._backward(run, sequences)
            tokens, losses = tokens + count, [*losses, loss]
            if extra is not None:
                extra(adapters).backward()
            self._clip([*decayed, *others])
            rate = self._rate(step, len(task.steps))
            rates += rate
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        trained = {key: value.detach() for key, value in adapters.items()}
        return Trained(trained, own.detach(), run.counts, tokens, rates, sum(losses) / len(losses), losses[0])

    def frozen_weight(self, stem: str) -> Tensor:
        """The frozen matrix under an adapter: the one that is computed with, to be changed in place."""
        parts = stem.split(".")
        layer = self.model.model.layers[int(parts[1])]
        if parts[2] == "attention":
            projection: nn.Linear = getattr(layer.self_attn, parts[3])
            return projection.weight.data
        _, gate_up, down = layer.mlp.weights
        weight: Tensor = (gate_up if parts[4] == "gate_up" else down).data[int(parts[3])]
        return weight

    @torch.no_grad()
    def _survey(self, run: Running, sequences: Sequence[tuple[np.ndarray, np.ndarray]], select: Select) -> dict[int, set[int]]:
        """Look at the whole batch before any of it is trained on."""
        counts = run.counts.copy()
        run.logits.clear()
        for ids, mask in sequences:
            self.loss_sum(ids, mask)
        run.counts = counts
        return {layer: select(layer, torch.cat(logits).softmax(-1).numpy()) for layer, logits in run.logits.items()}

    def _clip(self, parameters: list[Tensor]) -> None:
        norm = math.sqrt(sum(float(parameter.grad.square().sum()) for parameter in parameters if parameter.grad is not None))
        if self.settings.clip is not None and norm > self.settings.clip:
            for parameter in parameters:
                assert parameter.grad is not None
                parameter.grad *= self.settings.clip / norm

    def _backward(self, run: Running, sequences: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[int, float]:
        """Tokens of a step, and its mean loss over targets."""
        targets = sum(int(mask.sum()) for _, mask in sequences)
        tokens = sum(len(ids) for ids, _ in sequences)
        size, mean = self.settings.micro or len(sequences), 0.0
        for first in range(0, len(sequences), size):
            part = sequences[first : first + size]
            run.logits.clear()
            self.features.clear()
            if self.objective is None:
                loss = torch.stack([self.loss_sum(ids, mask) for ids, mask in part]).sum() / targets
            else:
                logits, labels = zip(*(self.predictions(ids, mask) for ids, mask in part), strict=True)
                loss = self.objective(torch.cat(logits), torch.cat(labels)) / targets
            mean += float(loss.detach())
            loss = loss + self.auxiliary() * sum(len(ids) for ids, _ in part) / tokens
            loss.backward()
        return tokens, mean

    def _optimizer(self, decayed: list[Tensor], others: list[Tensor]) -> torch.optim.Optimizer:
        groups = [{"params": decayed, "weight_decay": self.settings.weight_decay}]
        if others:
            groups.append({"params": others, "weight_decay": 0.0})
        if self.settings.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=0.0, momentum=self.settings.momentum)
        return torch.optim.AdamW(groups, lr=0.0, eps=self.settings.eps)

    def _rate(self, step: int, steps: int) -> float:
        ramp = math.ceil(self.settings.warmup * steps)
        if step < ramp:
            return self.settings.lr * (step + 1) / ramp
        if self.settings.schedule == "cosine":
            return self.settings.lr * (1 + math.cos(math.pi * (step - ramp) / max(1, steps - ramp))) / 2
        return self.settings.lr

    @torch.no_grad()
    def evaluate(self, adapters: Adapters, rescaler: Tensor, cap: int, sequences: Any) -> float:
        """Mean loss per target at one tier."""
        self.start(adapters, rescaler, cap)
        pairs = list(zip(sequences.input_ids, sequences.loss_mask, strict=True))
        total = sum(float(self.loss_sum(ids, mask)) for ids, mask in pairs)
        return total / sum(int(mask.sum()) for _, mask in pairs)


class _Block(nn.Module):
    """The loop in the place of a mixture block."""

    def __init__(self, original: Any, index: int, reference: Reference) -> None:
        super().__init__()
        self.weights = (original.gate.weight, original.experts.gate_up_proj, original.experts.down_proj)
        self.index = index
        self._reference = [reference]  # in a list: no submodule

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        y_TD = self._reference[0].mixture(self.index, *self.weights, hidden_BSD.flatten(0, 1))
        return y_TD.view_as(hidden_BSD)


def _exact_norms(model: nn.Module) -> None:
    """Hugging Face's RMSNorm computes in float32 whatever it is given; torch's does not."""
    for path, module in list(model.named_modules()):
        if type(module).__name__ == "OlmoeRMSNorm":
            norm = nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon, dtype=torch.float64)
            norm.weight = module.weight
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, norm)
