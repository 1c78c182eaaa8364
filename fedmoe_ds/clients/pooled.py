"""Pooled data: all clients' sequences as one client's, for the centralised bound.

A round trains on exactly the sequences that its participants would train on, each as often as they would, shuffled over all of
them and cut into whole batches: the same tokens as a federated round, in fewer steps where small clients had small batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedmoe_ds.clients.batches import local_batches
from fedmoe_ds.clients.client import Client, counts_of, richest
from fedmoe_ds.config import LocalConfig
from fedmoe_ds.data import FederatedData, Sequences
from fedmoe_ds.randomness import generator


class PooledData:
    """One client that owns everything."""

    def __init__(self, data: FederatedData) -> None:
        self.data = data
        self._lengths: NDArray[np.int64] | None = None

    def train(self, client: int) -> Sequences:
        """All training sequences, clients in canonical order."""
        assert client == 0, client
        parts = [self.data.train(index) for index in range(len(self.data))]
        ids, masks = [row for part in parts for row in part.input_ids], [row for part in parts for row in part.loss_mask]
        pixels = [part.pixels for part in parts if part.pixels is not None]
        labels = [part.labels for part in parts if part.labels is not None]
        # A federation is of one task, so either all parts have pixels or none has.
        if pixels:
            scores = [part.scores for part in parts if part.scores is not None]
            scores_N = np.concatenate(scores) if scores else None
            return Sequences.of_images(np.concatenate(pixels), np.concatenate(labels), scores_N)
        return Sequences(ids, masks)

    def train_lengths(self, client: int) -> NDArray[np.int64]:
        """Tokens of each of them."""
        assert client == 0, client
        if self._lengths is None:  # asked for at every step
            self._lengths = np.concatenate([self.data.train_lengths(index) for index in range(len(self.data))])
        return self._lengths


def pooled_client(
    clients: Sequence[Client], members: Sequence[Client], local: LocalConfig, seed: int, round_index: int
) -> Client:
    """The pooled client in a round with these participants: everybody's data, the largest budget, the participants' tokens."""
    largest = richest(clients)
    return replace(
        largest,
        index=0,
        name="all clients",
        samples=int(counts_of(clients, "samples").sum()),
        sequences=int(counts_of(clients, "sequences").sum()),
        targets=int(counts_of(clients, "targets").sum()),
        rows=int(counts_of(clients, "token_rows").sum()),
        steps=len(pooled_batches(clients, members, local, seed, round_index)),
    )


def pooled_batches(
    clients: Sequence[Client], members: Sequence[Client], local: LocalConfig, seed: int, round_index: int
) -> list[np.ndarray]:
    """Sequence indices of every step of the pooled client, among all sequences in canonical order; the last may be smaller."""
    # All clients, in canonical order: an index is a place.
    first = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts_of(clients, "sequences"))])
    own = [np.concatenate(local_batches(member, local, seed, round_index)) + first[member.index] for member in members]
    visits = generator(seed, "pooled", round_index).permutation(np.concatenate(own))
    return [visits[start : start + local.batch_size] for start in range(0, len(visits), local.batch_size)]
