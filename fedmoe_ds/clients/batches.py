"""Batches: which sequences a client trains on, step by step, and pass by pass. Known to every rank without reading any data;
where samples are packed, with their lengths.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from fedmoe_ds.clients.client import Client
from fedmoe_ds.config import LocalConfig
from fedmoe_ds.randomness import generator


def step_count(client: Client, config: LocalConfig, samples: int | None = None) -> int:
    """Number of local steps in one round: as many batches as `epochs` passes over the client's data fill, rounded up.

    `samples`: how many of its samples it uses, None for what the client says.
    """
    if client.steps is not None:
        return client.steps
    if config.steps is not None:
        return config.steps
    # The decimal number that the user wrote: as a float, 1.1 passes over 10 sequences would be a little more than 11.
    passes, count = Fraction(str(config.epochs)), client.trained_sequences if samples is None else samples
    steps = math.ceil(passes * count / batch_size(client, config, samples))
    return min(steps, config.max_steps) if config.max_steps is not None else steps


def batch_size(client: Client, config: LocalConfig, samples: int | None = None) -> int:
    """Sequences per step: never more than the client has, or uses."""
    return min(config.batch_size, client.trained_sequences if samples is None else samples)


def local_batches(
    client: Client, config: LocalConfig, seed: int, round_index: int, samples: np.ndarray | None = None
) -> list[np.ndarray]:
    """Sequence indices of every step. Each pass over the data is an addressed permutation; steps run over its boundaries.

    `samples`: the numbers of the samples that it uses, None for all.
    """
    count = client.sequences if samples is None else len(samples)
    used = None if samples is None else count
    size, steps = batch_size(client, config, used), step_count(client, config, used)
    epochs = math.ceil(steps * size / count)
    # Addressed by (round, client, pass), no running stream: a resumed round and any other rank draw the same order.
    order = np.concatenate([generator(seed, "batches", round_index, client.index, e).permutation(count) for e in range(epochs)])
    order = order if samples is None else samples[order]
    return [order[s * size : (s + 1) * size] for s in range(steps)]


Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Packing:
    """What cuts the steps of packed samples into passes.

    Attributes:
        sequence_length: tokens of a full sequence (`data.sequence_length`).
        lengths: of every training sequence of a client, by its index.
    """

    sequence_length: int
    lengths: Callable[[int], Counts]


def pass_bounds(batch: np.ndarray, size: int | None, packing: Packing | None = None, client: int = 0) -> list[int]:
    """Where the passes over a step's samples begin in it, and the end of the last one.

    Args:
        size: sequences in a pass, None for all. Packed, a pass takes as many whole samples, in their order, as fit into the
            tokens of that many full sequences.
        client: whose samples they are.
    """
    if size is None or size >= len(batch):
        return [0, len(batch)]
    if packing is None:
        return [*range(0, len(batch), size), len(batch)]
    room, used, bounds = size * packing.sequence_length, 0, [0]
    for place, length in enumerate(packing.lengths(client)[batch].tolist()):
        # No sample is longer than a sequence, so a pass that begins with it has room for it.
        if used + length > room:
            bounds.append(place)
            used = 0
        used += length
    return [*bounds, len(batch)]


def pass_sizes(batch: np.ndarray, bounds: list[int], packing: Packing | None = None, client: int = 0) -> list[int]:
    """Sequences of a step's passes; packed, how many full sequences have as many tokens, rounded up."""
    if packing is None:
        return np.diff(bounds).tolist()
    tokens = np.add.reduceat(packing.lengths(client)[batch], bounds[:-1])
    return (-(-tokens // packing.sequence_length)).tolist()  # type: ignore[no-any-return]
