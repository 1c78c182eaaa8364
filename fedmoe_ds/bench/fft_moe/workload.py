"""Pool workload: a small dense language model, and the client steps of FFT-MoE with adapter experts beside its blocks.

Legend: C clients, N steps, B sequences per client and step, S positions, D model width.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedmoe_ds.errors import UserError
from fedmoe_ds.randomness import generator

DENSE = "dense foundation"
POOL_PREFIX = "experts "

# The dense model: D 128, four layers, a feed-forward block of twice the width.
HIDDEN, FFN, LAYERS, HEADS, VOCAB, POSITIONS = 128, 256, 4, 4, 2048, 512


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
        for name, value, least in (
            ("--steps", self.steps, 1),
            ("--clients", self.clients, 1),
            ("--sequences", self.sequences, 1),
            ("--length", self.length, 2),
            ("--seed", self.seed, 0),
        ):
            if value < least:
                raise UserError(f"{name}: {value}: too small; use {least} or more")
        if self.length > POSITIONS:
            raise UserError(f"--length: {self.length}: the measured model has {POSITIONS} positions; use {POSITIONS} or less")

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
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
        initializer_range=0.1,  # so that losses differ from sequence to sequence
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
