"""Workload: what every system trains in a measured wave, drawn from addresses, so that all systems draw the same.

Legend: C clients, N steps, B sequences per step, S positions.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fedmoe_ds.bench.harness.checks import check_known, check_least
from fedmoe_ds.bench.harness.shapes import Shape, check_positions, find_shape
from fedmoe_ds.bench.harness.system import AGREEMENT
from fedmoe_ds.errors import UserError
from fedmoe_ds.kernels.lora_products import Kernels, check_kernels
from fedmoe_ds.randomness import generator, torch_generator

WARM_UP_STEPS = 2
"""Enough for the second loss to depend on every gradient and on the optimizer."""

_LORA_B_BOUND = 0.1  # not zero as at a start from scratch: the very first loss shall depend on A, B and their scale


@dataclass(frozen=True)
class Workload:
    """Clients with their caps, local steps and adapters; the optimizer is AdamW without decay or clipping."""

    shape: Shape
    steps: int
    sequences: int
    length: int
    seed: int
    caps: tuple[int, ...] = (8, 8, 4, 4, 2, 2, 1, 1)
    rank: int = 8
    alpha: float = 16.0
    lr: float = 1e-3
    attention: tuple[str, ...] = ("q_proj", "v_proj")
    dtype: str = "float32"  # of the frozen weights; adapters are float32
    device: str = "cpu"
    kernels: Kernels = "auto"  # of our adapters' products
    moments: Literal["float32", "bfloat16"] = "float32"  # of our optimizer

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("sequences", 1), ("length", 2), ("seed", 0)):
            check_least(f"--{name}", getattr(self, name), least)
        check_known("--dtype", "type", self.dtype, AGREEMENT)
        check_known("--device", "device", self.device, ("cpu", "cuda"))
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device: cuda: no CUDA device is visible; leave it out")
        check_known("--kernels", "kernels", self.kernels, get_args(Kernels))
        check_kernels(self.kernels, self.rank, torch.device(self.device))
        check_positions(self.length)

    @property
    def feed_forward(self) -> tuple[str, ...]:
        """Feed-forward projections with LoRA: those of a model without experts."""
        return () if self.shape.experts else ("gate_proj", "up_proj", "down_proj")

    @property
    def tokens(self) -> int:
        """Token rows of the timed wave."""
        return len(self.caps) * self.steps * self.sequences * self.length

    def stage_steps(self, stage: str) -> int:
        """Local steps of a stage, `warm-up` or `timed`."""
        return WARM_UP_STEPS if stage == "warm-up" else self.steps

    def token_ids(self, stage: str, client: int) -> np.ndarray:
        """int64 [N, B, S]: one client's sequences in the order in which it trains on them."""
        shape = (self.stage_steps(stage), self.sequences, self.length)
        return generator(self.seed, "bench-tokens", stage, client).integers(2, self.shape.vocab, shape)

    def initial_value(self, key: str, shape: torch.Size) -> Tensor:
        """The value of one adapter tensor (A: [R, in], B: [out, R]) from which every client starts."""
        bound = 1.0 / math.sqrt(shape[-1]) if key.endswith("lora_A") else _LORA_B_BOUND
        return torch.empty(shape).uniform_(-bound, bound, generator=torch_generator(self.seed, "bench-adapters", key))

    def facts(self) -> dict[str, Any]:
        """What a row says about the work."""
        names = ("sequences", "length", "steps", "seed", "tokens")
        wave = {"clients": len(self.caps), "caps": list(self.caps), **{name: getattr(self, name) for name in names}}
        return {**wave, **self.shape.facts()}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Workload:
        lists = {name: tuple(tree[name]) for name in ("caps", "attention")}
        return cls(**{**tree, **lists, "shape": Shape(**tree["shape"])})


def make_workloads(shapes: list[str], sequences: list[int], dense: bool = False, **settings: Any) -> list[Workload]:
    """One workload per shape name and number of sequences in a step; `dense` allows shapes without experts."""
    found = [find_shape(name, dense) for name in dict.fromkeys(shapes)]
    counts = dict.fromkeys(sequences)
    return [Workload(shape, sequences=n, caps=_caps(shape), **settings) for shape in found for n in counts]


def _caps(shape: Shape) -> tuple[int, ...]:
    """Eight clients; without experts there is nothing to cap."""
    return Workload.caps if shape.experts else (1,) * len(Workload.caps)
