"""Adapter dropout: which inputs of a projection's adapter a training pass leaves out, drawn by address.

    y = W x + s B A (m * x) / (1 - p)        m is 1 with probability 1 - p; as in PEFT's LoRA layers, W sees all of x

A number's draw belongs to (seed, round, client, the client's step, layer, projection; place of the sequence in the step;
position, feature). It depends on no other client, no micro-batch, no rank and no resume, and a layer that is computed again,
for its backward pass or by activation checkpointing, draws the same. Nothing of a mask is kept.

Legend: B sequences, S positions of the pass, N positions of a sequence, T rows, D input width.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedmoe_ds.kernels.per_client import Segment
from fedmoe_ds.model.upload import upload
from fedmoe_ds.randomness import address_key

Address = tuple[int, int, int, int]
"""(round, client, step, place of the first sequence in the step) of one client's rows in a pass."""


class Drawn(NamedTuple):
    """Where one client's rows in a pass draw, and the lengths of its sequences there."""

    address: Address
    lengths: list[int]


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
        drawn_at: list[Drawn],
        projection: tuple[int, str],
        shape: torch.Size,
        device: torch.device,
    ) -> Tensor:
        """bool [T, D] for rows of this shape: what a projection (layer, `part.name`) lets through. False in padding.

        Args:
            drawn_at: of each segment.
        """
        kept_TD = np.zeros(shape, dtype=bool)
        positions = shape[0] // segments[-1].stop
        for segment, (address, lengths) in zip(segments, drawn_at, strict=True):
            *client, first = address
            key = address_key(self.seed, "adapter-dropout", *client, *projection)
            # Sequences are 2^128 blocks of the counter apart, so that one hash serves all of the step.
            stream = np.random.Philox(key=key, counter=first * _SEQUENCE)
            for start, length in zip(_starts(segment, lengths, positions), lengths, strict=True):
                # A word has four draws, a block four words.
                words = stream.random_raw(-(-length * shape[1] // 4))
                draws = words.astype("<u8", copy=False).view("<u2")[: length * shape[1]]
                kept_TD[start : start + length] = draws.reshape(length, -1) >= self.left_out
                stream.advance(_SEQUENCE - -(-len(words) // 4))
        return upload([kept_TD], device)[0]


def _starts(segment: Segment, lengths: list[int], positions: int) -> list[int]:
    """First rows of a segment's sequences: padded to the positions of the pass, or end to end (`model/packing.py`)."""
    if segment.stop - segment.start == len(lengths):
        return [place * positions for place in range(segment.start, segment.stop)]
    assert segment.stop - segment.start == sum(lengths), "packed: a token each"
    return list(accumulate(lengths[:-1], initial=segment.start))


def left_through(x_TD: Tensor, kept_TD: Tensor | None) -> Tensor:
    """x where it is kept, zero elsewhere; all of it without a mask."""
    return x_TD if kept_TD is None else torch.where(kept_TD, x_TD, 0.0)
