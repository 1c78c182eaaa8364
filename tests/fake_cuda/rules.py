"""Rules: what CUDA's kernels say about tensors on different devices.

Sources: aten/src/ATen/TensorIterator.cpp (scalars of the CPU beside tensors of a device), native/TensorAdvancedIndexing.cpp and
TensorIndexing.h (indices), native/TensorCompare.cpp (`where`) of torch.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from fake_cuda.counters import COUNT
from fake_cuda.operations import COPIES, INDEXING
from fake_cuda.tensor import on_cuda, tensors

_MASKED = ("masked_fill", "masked_fill_")
_WITH_SCALARS = ("where", "fill_", "lerp", "lerp_", *_MASKED)


@functools.cache
def name_of(func: Any) -> str:
    """`add_` of `aten::add_.Tensor`."""
    return str(func._schema.name).partition("::")[2]


def check(name: str, func: Any, args: Any, found: list[torch.Tensor]) -> torch.device | None:
    """The device of an operation on the tensors `found`; None: the CPU. Raises DeviceError where CUDA would refuse it."""
    here = [tensor for tensor in found if on_cuda(tensor)]
    if not here:
        return None
    device = here[0].device
    if name in COPIES:
        return device if on_cuda(args[0]) else None
    if name in INDEXING:
        _check_indexing(name, args)
    elif len(here) < len(found) or any(tensor.device != device for tensor in here):
        _check_mixed(name, func, args, found, device)
    return device


def _check_mixed(name: str, func: Any, args: Any, found: list[torch.Tensor], device: torch.device) -> None:
    others = [tensor for tensor in found if tensor.device != device]
    pointwise = torch.Tag.pointwise in func.tags or name in _WITH_SCALARS
    # A kernel takes a scalar of the CPU by value, but not a place to write to, and not a mask.
    written = args[0] if name.endswith("_") else None
    taken = pointwise and all(tensor.dim() == 0 and tensor.device.type == "cpu" for tensor in others)
    if taken and (written is None or on_cuda(written)) and not (name in _MASKED and not on_cuda(args[1])):
        if name == "where":  # it copies scalars to the device first
            for _ in others:
                COUNT.upload("where with a scalar", waits=True)
        return
    shapes = ", ".join(f"{tensor.device}{list(tensor.shape)}" for tensor in found)
    names = " and ".join(dict.fromkeys(str(tensor.device) for tensor in found))
    COUNT.refuse(
        f"aten::{name}: Expected all tensors to be on the same device, but found at least two devices, {names}! ({shapes})"
    )


def _check_indexing(name: str, args: Any) -> None:
    """An index of the CPU is copied to the device of what it indexes; one of another device is refused."""
    target, indices = args[0], tensors(args[1])
    allowed = "indices should be either on cpu or on the same device as the indexed tensor"
    if any(on_cuda(index) and index.device != target.device for index in indices):
        COUNT.refuse(f"aten::{name}: {allowed} ({target.device})")
    values = tensors(args[2]) if len(args) > 2 else []
    if any(value.device != target.device and (value.dim() > 0 or on_cuda(value)) for value in values):
        COUNT.refuse(f"aten::{name}: expected device {target.device} but got device {values[0].device} for value tensor")
    for index in indices:
        if on_cuda(target) and not on_cuda(index):
            COUNT.upload(f"{name} by an index on the CPU", waits=True)
