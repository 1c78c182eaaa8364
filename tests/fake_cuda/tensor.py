"""Tensor: one that says `cuda:0`, holds a tensor of the CPU, and hands every operation on it to dispatch.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fake_cuda.counters import COUNT

CPU = torch.device("cpu")
Handler = Callable[[Any, Any, Any], Any]
_handlers: list[Handler] = []


def handled_by(handler: Handler) -> Handler:
    """Let a function see every operation on these tensors: dispatch.py, which imports this module."""
    _handlers[:] = [handler]
    return handler


class _Held:
    """Lives as long as a tensor that keeps a storage."""

    def __init__(self, inner: torch.Tensor) -> None:
        self.key = COUNT.hold(inner.untyped_storage())

    def __del__(self) -> None:
        if hasattr(self, "key"):
            COUNT.drop(self.key)


class CudaTensor(torch.Tensor):
    """A wrapper without memory of its own: `inner` has the numbers."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device) -> CudaTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
            requires_grad=False,
        )
        made.inner, made.held = inner, _Held(inner)
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _handlers[0](func, args, kwargs or {})

    def __repr__(self, *args: Any, **kwargs: Any) -> str:
        return f"CudaTensor({self.inner!r})"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return self.item().__format__(spec) if self.dim() == 0 else repr(self)

    # These three read memory without dispatching an operation.
    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            COUNT.refuse(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() to copy the tensor first.")
        return self.detach().cpu().numpy()

    def __array__(self, dtype: Any = None) -> Any:
        return self.numpy()


def on_cuda(value: Any) -> bool:
    return isinstance(value, CudaTensor)


def tensors(tree: Any) -> list[torch.Tensor]:
    """All tensors in nested lists, tuples and dictionaries. Called for every operation: pytree would take most of the time."""
    found: list[torch.Tensor] = []
    _collect(tree, found)
    return found


def _collect(tree: Any, found: list[torch.Tensor]) -> None:
    if isinstance(tree, torch.Tensor):
        found.append(tree)
    elif isinstance(tree, tuple | list):
        for leaf in tree:
            _collect(leaf, found)
    elif isinstance(tree, dict):
        for leaf in tree.values():
            _collect(leaf, found)


def unwrap(tree: Any) -> Any:
    """The same with tensors of the CPU."""
    return _mapped(tree, lambda leaf: leaf.inner if isinstance(leaf, CudaTensor) else leaf)


def wrap(tree: Any, device: torch.device) -> Any:
    """The same with tensors on a device."""

    def wrapped(leaf: Any) -> Any:
        return CudaTensor(leaf, device) if isinstance(leaf, torch.Tensor) and not isinstance(leaf, CudaTensor) else leaf

    return _mapped(tree, wrapped)


def _mapped(tree: Any, change: Callable[[Any], Any]) -> Any:
    kind = type(tree)
    if kind is tuple or kind is list:
        return kind([_mapped(leaf, change) for leaf in tree])
    if kind is dict:
        return {key: _mapped(leaf, change) for key, leaf in tree.items()}
    return change(tree)


def is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def full_device(device: Any) -> torch.device | None:
    """With its index; None for the CPU. Raises DeviceError for one that is not visible."""
    device = torch.device(device)
    if device.type != "cuda":
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        COUNT.refuse("CUDA error: invalid device ordinal")
    return torch.device("cuda", index)
