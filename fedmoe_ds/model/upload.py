"""Upload: arrays of the host as tensors of the device, in one copy that the host does not wait for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 16
"""Bytes: of where each array begins, at least its widest type."""


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """These arrays, in the same shapes and types; on the CPU they are the arrays' own memory.

    A copy out of ordinary memory would make the host wait until the GPU has come to it: torch waits for the stream after each.
    So all of them are laid end to end in pinned memory, out of which the GPU fetches them itself while the host goes on. Torch
    keeps that memory until they have arrived.
    """
    held = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    if device.type == "cpu":
        return held
    packed = torch.empty(sum(_room(part) for part in held), dtype=torch.uint8, pin_memory=True)
    for part, place in zip(held, _places(packed, held), strict=True):
        place.copy_(part)
    return _places(packed.to(device, non_blocking=True), held)


def _room(part: Tensor) -> int:
    return -(-part.nbytes // _ALIGNMENT) * _ALIGNMENT


def _places(packed: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Views of packed bytes, one after the other, of the shapes and types of these tensors."""
    rooms = torch.split(packed, [_room(part) for part in like])
    return [room[: part.nbytes].view(part.dtype).view(part.shape) for room, part in zip(rooms, like, strict=True)]
