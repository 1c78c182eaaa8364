"""Adapter dropout: which inputs of a projection's adapter a training pass leaves out, drawn by address.

    y = W x + s B A (m * x) / (1 - p)        m is 1 with probability 1 - p; as in PEFT's LoRA layers, W sees all of x

A number's draw belongs to (seed, round, client, the client's step, layer, projection; place of the sequence in the step;
position, feature). It depends on no other client, no micro-batch, no rank and no resume, and a layer that is computed again,
for its backward pass or by activation checkpointing, draws the same. Nothing of a mask is kept.

Legend: B sequences, S positions of the pass, T = B * S rows, D input width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedmoe_ds.kernels.per_client import Segment
from fedmoe_ds.randomness import address_key

Address = tuple[int, int, int, int]
"""(round, client, step, place of the first sequence in the step) of one client's rows in a pass."""

_LEVELS, _SEQUENCE = 1 << 16, 1 << 128


class AdapterDropout:
    """LoRA dropout of a run.

    Args:
        probability: of a number to be left out, 0 < p < 1; the nearest multiple of 1 / 65536 is used, which 16 bits decide.
        seed: run seed.
    Attributes:
        gain: 1 / (1 - p), which keeps the expectation.
    """

    def __init__(self, probability: float, seed: int) -> None:
        # At least one level on either side: a dropout that was asked for happens, and something is left.
        self.left_out = min(max(round(probability * _LEVELS), 1), _LEVELS - 1)
        self.gain = 1.0 / (1.0 - self.left_out / _LEVELS)
        self.seed = seed

    def kept(
        self,
        segments: list[Segment],
        addresses: list[Address],
        projection: tuple[int, str],
        shape: torch.Size,
        device: torch.device,
    ) -> Tensor:
        """bool [T, D] for rows of this shape: what a projection (layer, `part.name`) lets through. False in padding.

        Args:
            addresses: of each segment.
        """
        sequences, width = segments[-1].stop, shape[-1]
        kept_BSD = np.zeros((sequences, shape[0] // sequences, width), dtype=bool)
        for segment, (round_index, client, step, first) in zip(segments, addresses, strict=True):
            key = address_key(self.seed, "adapter-dropout", round_index, client, step, *projection)
            # Sequences are 2^128 blocks of the counter apart, so that one hash serves all of the step.
            stream = np.random.Philox(key=key, counter=first * _SEQUENCE)
            numbers = min(segment.longest, kept_BSD.shape[1]) * width
            for kept_SD in kept_BSD[segment.start : segment.stop]:
                # A word has four draws. Row by row: how long the client's longest sequence is changes no earlier draw.
                words = stream.random_raw(-(-numbers // 4))
                draws_SD = words.astype("<u8", copy=False).view("<u2")[:numbers].reshape(-1, width)
                kept_SD[: len(draws_SD)] = draws_SD >= self.left_out
                stream.advance(_SEQUENCE - -(-len(words) // 4))  # a block has four words
        return torch.from_numpy(kept_BSD.reshape(-1, width)).to(device)


def left_through(x_TD: Tensor, kept_TD: Tensor | None) -> Tensor:
    """x where it is kept, zero elsewhere; all of it without a mask."""
    return x_TD if kept_TD is None else torch.where(kept_TD, x_TD, 0.0)
