"""Pool workload: a small dense language model, and the client steps of FFT-MoE with adapter experts beside its blocks.

Legend: C clients, N steps, B sequences per client and step, S positions, D model width.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedmoe_ds.bench.harness.checks import check_least
from fedmoe_ds.bench.harness.shapes import check_positions, save_random, sizes
from fedmoe_ds.randomness import generator

DENSE = "dense foundation"
POOL_PREFIX = "experts "

# The dense model: D 128, four layers, a feed-forward block of twice the width.
HIDDEN, FFN, LAYERS, HEADS, VOCAB = 128, 256, 4, 4, 2048


@dataclass(frozen=True)
class PoolWorkload:
    """What is trained in a wave; the optimizer is AdamW, with the run's default clipping, the routing loss the method's own."""

    steps: int
    clients: int
    sequences: int
    length: int
    seed: int
    bitwise: bool = False
    width: int = 16
    top_k: int = 4
    lr: float = 1e-3

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("clients", 1), ("sequences", 1), ("length", 2), ("seed", 0)):
            check_least(f"--{name}", getattr(self, name), least)
        check_positions(self.length)

    @property
    def tokens(self) -> int:
        """Token rows of one step of all clients."""
        return self.clients * self.sequences * self.length

    def token_ids(self, client: int) -> np.ndarray:
        """int64 [N, B, S]: one client's sequences in the order in which it trains on them."""
        shape = (self.steps, self.sequences, self.length)
        return generator(self.seed, "bench-pool-tokens", client).integers(2, VOCAB, shape)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def write_dense_model(seed: int, folder: Path) -> None:
    """Save the random dense model as a Hugging Face folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    save_random(LlamaForCausalLM, LlamaConfig(**sizes(VOCAB, HIDDEN, FFN, LAYERS, HEADS)), seed, folder)
