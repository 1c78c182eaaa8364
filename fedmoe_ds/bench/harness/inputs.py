"""Inputs: models and sequences in the form in which this package's own trainer takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedmoe_ds.clients.batches import local_batches
from fedmoe_ds.clients.client import Client
from fedmoe_ds.config import LocalConfig
from fedmoe_ds.data import Sequences
from fedmoe_ds.foundation import Foundation
from fedmoe_ds.foundation.dense import feed_forward_sites
from fedmoe_ds.foundation.loading import load_model


def load_bare(
    folder: Path, dtype: str = "float32", device: str = "cpu", ep_size: int = 1, rank: int = 0, dense: bool = False
) -> Foundation:
    """A model without tokenizer and fingerprint, which no measurement needs; `ep_size`, `rank` as in `load_model`."""
    model, layers = load_model(folder, getattr(torch, dtype), ep_size, rank, torch.device(device))
    config: Any = model.config
    return Foundation(
        model=model,
        tokenizer=None,
        layers=layers,
        top_k=0 if dense else config.num_experts_per_tok,
        num_experts=layers[0].num_experts if layers else 0,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        fingerprint="",
        path=folder,
        sites=feed_forward_sites(model) if dense else [],
    )


def whole_client(index: int, cap: int, samples: int, length: int, **more: Any) -> Client:
    """A client that trains on so many sequences, each of them once."""
    return Client(index, f"c{index}", cap, samples, samples, samples * length, cap, **more)


def in_order(ids_NBS: np.ndarray, client: Client, local: LocalConfig, seed: int) -> Sequences:
    """A client's sequences, laid out so that its addressed shuffling brings them up as they are here, step by step."""
    order = np.concatenate(local_batches(client, local, seed, 0))
    ids = ids_NBS.reshape(len(order), -1)
    stored = np.empty_like(ids)
    stored[order] = ids
    return predicted(stored)


def predicted(ids: np.ndarray) -> Sequences:
    """[samples, S]: sequences in which everything but the first token is predicted."""
    mask = np.ones(ids.shape, dtype=bool)
    mask[:, 0] = False
    return Sequences(list(ids), list(mask))
