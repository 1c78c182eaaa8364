"""Traffic: kernels, waits and bytes of one operation, by the tables of operations.py."""

from __future__ import annotations

from typing import Any

import torch

from fake_cuda import copies, distributed
from fake_cuda.counters import COUNT
from fake_cuda.operations import GATHERS, KERNELS, NO_KERNEL, PRODUCTS, WAITS
from fake_cuda.tensor import is_cuda, on_cuda, tensors


def count(name: str, args: Any, kwargs: Any, device: torch.device | None) -> None:
    """Count an operation, if it touches a device: that of its tensors, or of what it makes."""
    if name in ("_to_copy", "copy_") and copies.count_copy(name, args, kwargs):
        return
    if device is None and not is_cuda(kwargs.get("device")):
        return
    COUNT.ops[name] += 1
    if name in WAITS and not (name == "repeat_interleave" and kwargs.get("output_size") is not None):
        distributed.raise_late()
        COUNT.wait(name, WAITS[name])
    if name in ("index", "index_put_", "_index_put_impl_"):
        _count_masks(name, args)
    if name not in NO_KERNEL:
        COUNT.kernels += KERNELS.get(name, 1)


def _count_masks(name: str, args: Any) -> None:
    """A mask becomes indices by `nonzero`, whose size the host has to know; one number into one mask is a `masked_fill`."""
    masks = [index for index in tensors(args[1]) if on_cuda(index) and index.dtype in (torch.bool, torch.uint8)]
    if masks and not (name != "index" and len(masks) == 1 and args[2].numel() == 1):
        distributed.raise_late()
        COUNT.wait(f"{name} by a mask", len(masks))
        COUNT.kernels += 3 * len(masks)


def count_bytes(name: str, given: list[torch.Tensor], out: Any) -> None:
    """Count the bytes that a kernel reads and writes."""
    read = [tensor for tensor in given if on_cuda(tensor)]
    if name in NO_KERNEL or not read:
        return
    in_place = name.endswith("_")
    written = [read[0]] if in_place else tensors(out)
    if name in ("zero_", "fill_"):
        read = []
    elif name in GATHERS:
        read = written
    COUNT.bytes["products" if name in PRODUCTS else name] += sum(t.numel() * t.element_size() for t in (*read, *written))
