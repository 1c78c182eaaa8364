"""Memories: the few numbers that the server knows of every client that has been trained, the same on every rank.

A method says which (`Method.memory`), and writes them after a client's training. They become known with the reports of a round
and count from the next one, so a round that is resumed in its middle is planned as it was. Personal state, in contrast, stays
with the client and never reaches the server.

Legend: N clients.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedmoe_ds.checkpoint.reader import TensorReader
from fedmoe_ds.errors import UserError

Memory = Mapping[str, np.ndarray]
"""One client's numbers by name, float64."""
Shapes = Mapping[str, tuple[int, ...]]
FILE = "memories-00000-of-00001.safetensors"
_PREFIX, _CLIENTS = "memories-", "clients"


def checked(method: str, shapes: Shapes, found: Memory) -> dict[str, np.ndarray]:
    """What a method has written about a client, as it is kept. Raises UserError unless it is what the method announced."""
    told = {name: np.asarray(value, dtype=np.float64) for name, value in found.items()}
    if {name: value.shape for name, value in told.items()} != dict(shapes):
        written = {name: value.shape for name, value in told.items()}
        raise UserError(f"method {method}: memorise gives {written}, and memory announces {dict(shapes)}; let both agree")
    return told


def encoded(memory: Memory) -> dict[str, str]:
    """As it travels: base64 of little-endian float64, which is exact and has a place for numbers that JSON has none for."""
    return {name: base64.b64encode(value.astype("<f8").tobytes()).decode() for name, value in memory.items()}


def decoded(told: Mapping[str, str], shapes: Shapes) -> dict[str, np.ndarray]:
    """Of `encoded`."""
    # Copies: two views and the bytes below them would be more than the numbers, and nobody could write to them.
    return {name: np.frombuffer(base64.b64decode(told[name]), "<f8").reshape(shape).copy() for name, shape in shapes.items()}


def tensors(memories: Mapping[int, Memory], of: str) -> dict[str, Tensor]:
    """For a checkpoint: `OF.clients` int64 [N], and every name `OF.NAME` float64 [N, ...]; nothing where nobody is known."""
    if not memories:
        return {}
    clients = sorted(memories)
    names = memories[clients[0]]
    found = {f"{of}.{name}": torch.from_numpy(np.stack([memories[client][name] for client in clients])) for name in names}
    return {f"{of}.{_CLIENTS}": torch.tensor(clients), **found}


def read(path: Path, files: Iterable[str], of: str) -> dict[int, dict[str, np.ndarray]]:
    """What `tensors` has made of them; empty where the checkpoint has none. Raises UserError where the file is damaged."""
    with TensorReader(path, _PREFIX, files) as reader:
        if f"{of}.{_CLIENTS}" not in reader:
            return {}
        names = [key.removeprefix(f"{of}.") for key in reader if key.startswith(f"{of}.")]
        values = {name: reader.read(f"{of}.{name}").numpy() for name in names if name != _CLIENTS}
        clients = reader.read(f"{of}.{_CLIENTS}").tolist()
    return {client: {name: value_N[i] for name, value_N in values.items()} for i, client in enumerate(clients)}
