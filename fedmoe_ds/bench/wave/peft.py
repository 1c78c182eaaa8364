"""Peers: the same workload as a user would run it today, with transformers and PEFT, one client after the other.

Adapters are PEFT's own: `target_parameters` for the fused expert matrices, `target_modules` for projections. At every forward
pass of an expert layer PEFT adds (alpha / rank) B A of all experts to a copy of the frozen stack; we apply alpha / rank to the
rank-wide middle of each row instead. In exact arithmetic both are the same function of the same A and B.

Legend: E experts, R adapter rank, D model width, O output width, B sequences, S positions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedmoe_ds.bench.harness.system import Clock, Outcome
from fedmoe_ds.bench.harness.workload import Workload
from fedmoe_ds.errors import UserError
from fedmoe_ds.machine import available_mib

_MODULES = {"gate_up_proj": "experts.gate_up", "down_proj": "experts.down"}
_LORA = re.compile(
    r".*layers\.(\d+)\.(?:(self_attn|mlp)\.(\w+_proj)|(mlp\.experts)(\.base_layer)?)\.(lora_[AB])\.default\.weight"
)


class Peft:
    """One PEFT model; a client is a cap, a reset of the adapters and a new AdamW."""

    def __init__(self, folder: Path, workload: Workload, implementation: str) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        _check_memory(workload, implementation)
        base = AutoModelForCausalLM.from_pretrained(
            folder,
            experts_implementation=implementation,
            attn_implementation="sdpa",
            dtype=getattr(torch, workload.dtype),
            trust_remote_code=False,
        )
        base.config.use_cache = False
        assert base.config._experts_implementation == implementation
        lora = LoraConfig(
            r=workload.rank,
            lora_alpha=workload.alpha,
            target_modules=[*workload.attention, *workload.feed_forward],
            target_parameters=[f"mlp.experts.{name}" for name in _MODULES] if workload.shape.experts else None,
        )
        self.workload = workload
        self.model: Any = get_peft_model(base, lora).train().to(workload.device)
        self.routers = [module for module in self.model.modules() if hasattr(module, "norm_topk_prob")]
        assert len(self.routers) == (workload.shape.layers if workload.shape.experts else 0)
        start = {name: _initial(name, value, self.model, workload) for name, value in self._trainables()}
        self.start = {name: value.to(workload.device) for name, value in start.items()}

    def train(self, stage: str) -> Outcome:
        load = self.workload
        data = [torch.from_numpy(load.token_ids(stage, client)).to(load.device) for client in range(len(load.caps))]
        clock = Clock(load.device)
        losses = [self._train_client(cap, tokens) for cap, tokens in zip(load.caps, data, strict=True)]
        return Outcome(clock.stop(), losses, [])

    def _train_client(self, cap: int, tokens_NBS: Tensor) -> tuple[float, float]:
        for router in self.routers:  # what config.num_experts_per_tok = cap would have built
            router.top_k = cap
        with torch.no_grad():
            for name, value in self._trainables():
                value.copy_(self.start[name])
        parameters = [value for _, value in self._trainables()]
        # The fused kernel is the fastest AdamW that torch has, on a CPU at least.
        optimizer = torch.optim.AdamW(parameters, lr=self.workload.lr, weight_decay=0.0, fused=True)
        losses = []
        for tokens_BS in tokens_NBS:
            loss = self.model(input_ids=tokens_BS, labels=tokens_BS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return losses[0], losses[-1]

    def _trainables(self) -> Iterator[tuple[str, Any]]:
        return ((name, value) for name, value in self.model.named_parameters() if value.requires_grad)


def _initial(name: str, value: Tensor, model: Any, workload: Workload) -> Tensor:
    """The workload's values under a PEFT parameter name. Raises for a name that has no counterpart here."""
    match = _LORA.fullmatch(name)
    assert match is not None, name
    layer, block, projection, experts, _, which = match.groups()
    if experts is None:
        part = {"self_attn": "attention", "mlp": "feed_forward"}[block]
        return workload.initial_value(f"layers.{layer}.{part}.{projection}.{which}", value.shape)
    wrapper = model.get_submodule(name.removesuffix(f".{which}.default.weight"))
    kind = _MODULES[wrapper.parameter_name]
    head, _, tail = kind.partition(".")
    keys = [f"layers.{layer}.{head}.{expert}.{tail}.{which}" for expert in range(workload.shape.experts)]
    rank = workload.rank
    if which == "lora_A":  # PEFT: [E * R, D], expert by expert
        item = torch.Size((rank, value.shape[1]))
        return torch.cat([workload.initial_value(key, item) for key in keys])
    item = torch.Size((value.shape[0], rank))  # PEFT: [O, R * E], the expert index runs fastest
    return torch.stack([workload.initial_value(key, item) for key in keys], dim=-1).flatten(1)


def _check_memory(workload: Workload, implementation: str) -> None:
    """`batched_mm` copies an expert's matrices for every routed row and keeps them for the backward pass."""
    if implementation != "batched_mm":
        return
    shape = workload.shape
    rows = workload.sequences * workload.length * max(workload.caps)
    need = rows * 3 * shape.ffn * shape.hidden * 4 * (shape.layers + 1) / 2**20
    if need > available_mib():
        raise UserError(
            f"--peers: batched_mm: it copies the expert matrices for each routed row, about {need / 1024:.0f} GiB at shape "
            f"{shape.name}, and {available_mib() / 1024:.0f} GiB are free; leave it out or lower --sequences"
        )
