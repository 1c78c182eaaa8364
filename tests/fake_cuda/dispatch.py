"""Dispatch: the one way of every operation that touches a device: check it, count it, compute it on the CPU."""

from __future__ import annotations

import functools
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

from fake_cuda import copies, distributed, kernels, rules, traffic
from fake_cuda.tensor import CPU, full_device, handled_by, is_cuda, on_cuda, tensors, unwrap, wrap


class Mode(TorchDispatchMode):
    """Sees every operation of a thread: a factory, or a collective, has no argument of ours that would lead it here."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        ours = func.namespace == "c10d" or is_cuda(kwargs.get("device")) or any(map(on_cuda, tensors((args, kwargs))))
        if ours or rules.name_of(func) in copies.PINNING:
            return dispatch(func, args, kwargs)
        if kwargs.get("pin_memory"):
            return copies.remember_pinned(func(*args, **{**kwargs, "pin_memory": False}))
        return func(*args, **kwargs)


@handled_by
def dispatch(func: Any, args: Any, kwargs: Any) -> Any:
    """Check an operation by CUDA's rules, count it, and compute it on the CPU."""
    distributed.finish_works()
    if func.namespace == "c10d":
        return distributed.collective(func, args, kwargs)
    name, given = rules.name_of(func), tensors((args, kwargs))
    device = rules.check(name, func, args, given)
    traffic.count(name, args, kwargs, device)
    if name in kernels.SPECIAL and device is not None:
        return kernels.SPECIAL[name](func, args, kwargs)
    if name in copies.PINNING:
        return copies.PINNING[name](*args, **kwargs)
    if name == "copy_":
        unwrap(args[0]).copy_(unwrap(args[1]))
        return args[0]
    inner_args, inner_kwargs = unwrap(args), unwrap(kwargs)
    if inner_kwargs.get("device") is not None:
        device = full_device(inner_kwargs["device"])
        inner_kwargs["device"] = CPU
    inner_kwargs.pop("pin_memory", None)
    inner_kwargs.pop("non_blocking", None)
    out = func(*inner_args, **inner_kwargs)
    traffic.count_bytes(name, given, out)
    if device is None or name == "_local_scalar_dense":
        return out
    out = wrap(out, device)
    return return_and_correct_aliasing(func, args, kwargs, out) if _aliases(func) else out


@functools.cache
def _aliases(func: Any) -> bool:
    """Whether a result is an argument that was written, or a view of one."""
    return any(argument.alias_info is not None for argument in func._schema.arguments)
