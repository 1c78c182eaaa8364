"""Sampling: which clients take part in a round."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedmoe_ds.clients.client import Client, counts_of, top_k_of
from fedmoe_ds.config import Config
from fedmoe_ds.randomness import generator


def participant_count(clients: int, participation: float) -> int:
    """Clients drawn per round."""
    return max(1, round(participation * clients))


def buffered(config: Config, clients: int) -> int | None:
    """Updates of a server step, where they arrive one by one; None where rounds draw their clients."""
    devices = config.devices
    return min(devices.buffer, clients) if devices.simulated and devices.aggregation == "buffered" else None


def participants(
    clients: Sequence[Client], participation: float, seed: int, round_index: int, sampling: str = "uniform", secret: str = ""
) -> list[Client]:
    """The clients of a round in canonical order: an addressed draw without replacement, at least one.

    Args:
        sampling: `uniform`, or in proportion to `size` (samples) or `budget` (top_k). Aggregation weights stay what they are:
            with `size` and weights by data size a client's samples count twice, in the draw and in the mean.
        secret: what the draw is addressed by as well; nothing where the seed alone decides.
    """
    # A count and not one coin per client: the schedule and the planner rely on its size.
    count = participant_count(len(clients), participation)
    # Canonical order: a client's place here is its place among the collected factors.
    address: tuple[int | str, ...] = (secret, round_index) if secret else (round_index,)
    return [clients[i] for i in draw(clients, count, seed, address, sampling)]


def draw(
    clients: Sequence[Client],
    count: int,
    seed: int,
    address: tuple[int | str, ...],
    sampling: str = "uniform",
    among: Sequence[int] | None = None,
) -> list[int]:
    """The places of `count` clients, in order; `among`: the places of those that may be drawn, None for all."""
    chances, total = None, len(clients) if among is None else len(among)
    if sampling != "uniform":
        mass = masses(clients, sampling) if among is None else masses(clients, sampling)[list(among)]
        chances = mass / mass.sum()
    chosen = sorted(generator(seed, "participants", *address).choice(total, size=count, replace=False, p=chances).tolist())
    return chosen if among is None else [among[place] for place in chosen]


def masses(clients: Sequence[Client], sampling: str) -> NDArray[np.float64]:
    """What clients are drawn in proportion to."""
    if sampling == "uniform":
        return np.ones(len(clients))
    return (counts_of(clients, "samples") if sampling == "size" else top_k_of(clients)).astype(np.float64)
