"""Sampling: which clients take part in a round."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedmoe_ds.clients.client import Client, counts_of, top_k_of
from fedmoe_ds.randomness import generator


def participant_count(clients: int, participation: float) -> int:
    """Clients drawn per round."""
    return max(1, round(participation * clients))


def participants(
    clients: Sequence[Client], participation: float, seed: int, round_index: int, sampling: str = "uniform"
) -> list[Client]:
    """The clients of a round in canonical order: an addressed draw without replacement, at least one.

    Args:
        sampling: `uniform`, or in proportion to `size` (samples) or `budget` (top_k). Aggregation weights stay what they are:
            with `size` and weights by data size a client's samples count twice, in the draw and in the mean.
    """
    # A count and not one coin per client: the schedule and the planner rely on its size.
    count = participant_count(len(clients), participation)
    chances = None
    if sampling != "uniform":
        mass = (counts_of(clients, "samples") if sampling == "size" else top_k_of(clients)).astype(np.float64)
        chances = mass / mass.sum()
    chosen = generator(seed, "participants", round_index).choice(len(clients), size=count, replace=False, p=chances)
    # Canonical order: a client's place here is its place among the collected factors.
    return [clients[i] for i in sorted(chosen.tolist())]
