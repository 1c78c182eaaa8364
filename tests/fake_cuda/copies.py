"""Copies between host and device: which of them wait, and pinned memory.

A copy to the host waits, unless it is `non_blocking` into pinned memory, which `.to("cpu", non_blocking=True)` allocates by
itself. A copy to the device waits, unless it is `non_blocking` and out of pinned memory: what lies in pageable memory has to be
staged, for which "the driver may synchronize with the stream". Whether it does depends on the driver and the size; here it
always does. Sources: aten/src/ATen/native/cuda/Copy.cu of torch (`memcpy_and_sync`), native/TensorConversions.cpp (`pin_out`),
"API synchronization behavior" of the CUDA Runtime API.

That a program reads or overwrites memory before such a copy is finished cannot be seen here: copies are done at once.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from fake_cuda import distributed
from fake_cuda.counters import COUNT
from fake_cuda.tensor import is_cuda, on_cuda

_pinned: set[int] = set()


def count_copy(name: str, args: Any, kwargs: Any) -> bool:
    """Count `_to_copy` or `copy_` if it goes between host and device."""
    if name == "_to_copy":
        source, place = args[0], kwargs.get("device")
        target_on_cuda = on_cuda(source) if place is None else is_cuda(place)
        pinned = not target_on_cuda or _is_pinned(source)  # a result on the host is new, and is pinned where it has to be
    else:
        source, target = args[1], args[0]
        target_on_cuda = on_cuda(target)
        pinned = _is_pinned(source if target_on_cuda else target)
    if on_cuda(source) == target_on_cuda:
        return False
    waits = not pinned or not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
    if target_on_cuda:
        COUNT.upload(name, waits)
    elif waits:
        distributed.raise_late()
        COUNT.wait(f"{name} to the CPU")
    return True


def _is_pinned(tensor: torch.Tensor, device: Any = None) -> bool:
    return not on_cuda(tensor) and tensor.untyped_storage()._cdata in _pinned


def _pin(tensor: torch.Tensor, device: Any = None) -> torch.Tensor:
    if on_cuda(tensor):
        COUNT.refuse("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
    return remember_pinned(tensor.clone())


def remember_pinned(tensor: torch.Tensor) -> torch.Tensor:
    storage = tensor.untyped_storage()
    _pinned.add(storage._cdata)
    weakref.finalize(storage, _pinned.discard, storage._cdata)
    return tensor


PINNING = {"_pin_memory": _pin, "is_pinned": _is_pinned}
