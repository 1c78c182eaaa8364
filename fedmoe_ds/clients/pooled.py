"""Pooled data: all clients' sequences as one client's, for the centralised bound."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from fedmoe_ds.clients.client import Client, richest
from fedmoe_ds.clients.steps import batch_size, step_count
from fedmoe_ds.config import LocalConfig
from fedmoe_ds.data import FederatedData, Sequences


class PooledData:
    """One client that owns everything."""

    def __init__(self, data: FederatedData) -> None:
        self.data = data

    def train(self, client: int) -> Sequences:
        """All training sequences, clients in canonical order."""
        assert client == 0, client
        parts = [self.data.train(index) for index in range(len(self.data))]
        ids, masks = [row for part in parts for row in part.input_ids], [row for part in parts for row in part.loss_mask]
        pixels = [part.pixels for part in parts if part.pixels is not None]
        labels = [part.labels for part in parts if part.labels is not None]
        if pixels:
            return Sequences.of_images(np.concatenate(pixels), np.concatenate(labels))
        return Sequences(ids, masks)


def pooled_client(clients: list[Client], local: LocalConfig) -> Client:
    """The pooled client: the largest budget, and steps on as many sequences as all clients together train on in a round."""
    largest = richest(clients)
    everyone = replace(
        largest,
        index=0,
        name="all clients",
        samples=sum(client.samples for client in clients),
        sequences=sum(client.sequences for client in clients),
        targets=sum(client.targets for client in clients),
    )
    trained = sum(step_count(client, local) * batch_size(client, local) for client in clients)
    return replace(everyone, steps=math.ceil(trained / batch_size(everyone, local)))
