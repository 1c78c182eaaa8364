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

from fedmoe_ds.bench.harness.shapes import Shape
from fedmoe_ds.errors import UserError, nearest
from fedmoe_ds.kernels.lora_products import Kernels, check_kernels
from fedmoe_ds.randomness import generator, torch_generator

WARM_UP_STEPS = 2
"""Enough for the second loss to depend on every gradient and on the optimizer."""

AGREEMENT = {"float32": 1e-4, "bfloat16": 3e-2}
"""How far losses of two systems may be apart, by the type of the frozen weights: bfloat16 has three digits, and systems round
in different places."""

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
        for name, value, least in (
            ("--steps", self.steps, 1),
            ("--sequences", self.sequences, 1),
            ("--length", self.length, 2),
            ("--seed", self.seed, 0),
        ):
            if value < least:
                raise UserError(f"{name}: {value}: too small; use {least} or more")
        if self.dtype not in AGREEMENT:
            raise UserError(f"--dtype: {self.dtype}: unknown type{nearest(self.dtype, AGREEMENT)}")
        if self.device not in ("cpu", "cuda"):
            raise UserError(f"--device: {self.device}: unknown device{nearest(self.device, ('cpu', 'cuda'))}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device: cuda: no CUDA device is visible; leave it out")
        if self.kernels not in get_args(Kernels):
            raise UserError(f"--kernels: {self.kernels}: unknown kernels{nearest(self.kernels, get_args(Kernels))}")
        check_kernels(self.kernels, self.rank, torch.device(self.device))
        if self.length > 512:
            raise UserError(f"--length: {self.length}: the measured models have 512 positions; use 512 or less")

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

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Workload:
        lists = {name: tuple(tree[name]) for name in ("caps", "attention")}
        return cls(**{**tree, **lists, "shape": Shape(**tree["shape"])})
