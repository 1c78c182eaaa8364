"""Upload: arrays of the host as tensors of the device, in one copy that the host does not wait for."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

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
    sizes = [-(-part.nbytes // _ALIGNMENT) * _ALIGNMENT for part in held]
    starts = list(accumulate(sizes, initial=0))
    packed = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=True)
    for part, start in zip(held, starts, strict=False):  # the last start is the end
        packed[start : start + part.nbytes].copy_(part.flatten().view(torch.uint8))
    there = packed.to(device, non_blocking=True)
    return [
        there[start : start + part.nbytes].view(part.dtype).view(part.shape) for part, start in zip(held, starts, strict=False)
    ]
