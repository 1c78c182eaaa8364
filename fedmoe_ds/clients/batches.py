"""Batches: which sequences a client trains on, step by step. Known to every rank without reading any data."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from fedmoe_ds.clients.client import Client
from fedmoe_ds.config import LocalConfig
from fedmoe_ds.randomness import generator


def step_count(client: Client, config: LocalConfig) -> int:
    """Number of local steps in one round: as many batches as `epochs` passes over the client's data fill, rounded up."""
    if client.steps is not None:
        return client.steps
    if config.steps is not None:
        return config.steps
    # The decimal number that the user wrote: as a float, 1.1 passes over 10 sequences would be a little more than 11.
    passes = Fraction(str(config.epochs))
    steps = math.ceil(passes * client.sequences / batch_size(client, config))
    return min(steps, config.max_steps) if config.max_steps is not None else steps


def batch_size(client: Client, config: LocalConfig) -> int:
    """Sequences per step: never more than the client has."""
    return min(config.batch_size, client.sequences)


def local_batches(client: Client, config: LocalConfig, seed: int, round_index: int) -> list[np.ndarray]:
    """Sequence indices of every step. Each pass over the data is an addressed permutation; steps run over its boundaries."""
    size, steps = batch_size(client, config), step_count(client, config)
    epochs = math.ceil(steps * size / client.sequences)
    # Addressed by (round, client, pass), no running stream: a resumed round and any other rank draw the same order.
    order = np.concatenate(
        [generator(seed, "batches", round_index, client.index, e).permutation(client.sequences) for e in range(epochs)]
    )
    return [order[s * size : (s + 1) * size] for s in range(steps)]
