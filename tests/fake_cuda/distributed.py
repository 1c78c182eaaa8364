"""Distributed: groups that say NCCL and are gloo's underneath, with what NCCL refuses, and when NCCL tells of failures.

A collective on NCCL returns before it has run, and so does `Work.wait`: it makes the device wait, not the host. The loss of a
peer shows later: at the host's next wait for the device, or torch's watchdog ends the process with SIGABRT. Here the work of a
collective is finished at the next operation. A moment after its failure the process is aborted; where the environment has
TORCH_NCCL_ASYNC_ERROR_HANDLING=0 as groups are made, the failure is raised at the next wait instead.

Source: torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp of torch.
"""

from __future__ import annotations

import functools
import os
import threading
from typing import Any

import torch
import torch.distributed as dist
import torch.utils._pytree as pytree

from fake_cuda.counters import COUNT, DeviceError
from fake_cuda.tensor import CudaTensor, on_cuda, tensors, unwrap

_ABORT_S = 0.1
_nccl: set[str] = set()
_begun: dict[int, Any] = {}
_unfinished: list[Any] = []
_finishing = threading.RLock()
_late: list[BaseException] = []
_aborts = True

_real_init, _real_new, _real_backend = dist.init_process_group, dist.new_group, dist.get_backend
_real_wait = dist.Work.wait


@functools.wraps(_real_init)
def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
    """As torch's; a device that is not visible fails here, and two ranks on one GPU, too."""
    global _aborts
    nccl = "nccl" in str(backend or "").lower()
    _aborts = os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING") != "0"
    device = kwargs.pop("device_id", None)
    if device is not None and device.index >= torch.cuda.device_count():
        raise DeviceError(f"init_process_group(device_id={device}): CUDA error: invalid device ordinal")
    _real_init("gloo" if nccl else backend, *args, **kwargs)
    if nccl:
        _nccl.add(dist.group.WORLD.group_name)
        _check_duplicates(torch.cuda.current_device() if device is None else device.index)


def first_gpu() -> int:
    """The GPU that this rank sees as number 0 (of $FAKE_GPU): ranks that see the same ones share it."""
    return int(os.environ.get("FAKE_GPU", "0"))


def _check_duplicates(index: int) -> None:
    """NCCL refuses two ranks on one GPU."""
    store, mine = dist.distributed_c10d._get_default_store(), dist.get_rank()
    store.set(f"fake-gpu-{mine}", str(first_gpu() + index))
    found = [store.get(f"fake-gpu-{rank}") for rank in range(dist.get_world_size())]
    for rank, gpu in enumerate(found):
        if rank != mine and gpu == found[mine]:
            low, high = sorted((rank, mine))
            raise dist.DistBackendError(f"NCCL error: invalid usage: Duplicate GPU detected : rank {low} and rank {high}")


@functools.wraps(_real_new)
def new_group(ranks: Any = None, timeout: Any = None, backend: str | None = None, *args: Any, **kwargs: Any) -> Any:
    nccl = "nccl" in str(backend).lower() if backend else dist.group.WORLD.group_name in _nccl
    made = _real_new(ranks, timeout, "gloo" if nccl else backend, *args, **kwargs)
    if nccl and made is not dist.GroupMember.NON_GROUP_MEMBER and made is not None:
        _nccl.add(made.group_name)
    return made


@functools.wraps(_real_backend)
def get_backend(group: Any = None) -> str:
    name = (dist.group.WORLD if group is None else group).group_name
    return "nccl" if name in _nccl else _real_backend(group)


def collective(func: Any, args: Any, kwargs: Any) -> Any:
    """Check and run one operation of a group."""
    name = str(func._schema.name).partition("::")[2]
    found = tensors((args, kwargs))
    ours = [tensor for tensor in found if on_cuda(tensor)]
    nccl = _group_name(args, kwargs) in _nccl
    if name == "barrier" and nccl:
        COUNT.wait("barrier")  # its tensor is made by the group's own backend, which is gloo's here
    elif nccl and len(ours) < len(found):
        COUNT.refuse(f"c10d::{name}: No backend type associated with device type cpu")
    elif nccl and not all(tensor.is_contiguous() for tensor in found):
        COUNT.refuse(f"c10d::{name}: Tensors must be contiguous")
    elif not nccl and ours:
        COUNT.refuse(f"c10d::{name}: a CUDA tensor over gloo: refused, or staged through the host")
    if not nccl:
        return func(*unwrap(args), **unwrap(kwargs))
    COUNT.ops[f"c10d::{name}"] += 1
    COUNT.kernels += 1
    try:
        out = func(*unwrap(args), **unwrap(kwargs))
    except RuntimeError as error:
        raise dist.DistBackendError(f"NCCL communicator was aborted: {str(error).splitlines()[0]}") from None
    _remember(out)
    return _as_given(out, args)


def _group_name(args: Any, kwargs: Any) -> str | None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.ScriptObject):
            try:
                return str(dist.ProcessGroup.unbox(value).group_name)
            except (RuntimeError, TypeError):  # another class: how to reduce
                continue
    return None


def _as_given(out: Any, args: Any) -> Any:
    """Tensors of a result are arguments that were written."""
    given = {(t.inner.data_ptr(), tuple(t.shape)): t for t in tensors(args) if isinstance(t, CudaTensor)}

    def ours(leaf: Any) -> Any:
        return given.get((leaf.data_ptr(), tuple(leaf.shape)), leaf) if isinstance(leaf, torch.Tensor) else leaf

    return pytree.tree_map(ours, out)


def _remember(out: Any) -> None:
    """Keep the work: as long as it lives, whoever gets it in Python gets this very object."""
    for value in out if isinstance(out, tuple | list) else [out]:
        if isinstance(value, torch.ScriptObject):
            work = dist.Work.unbox(value)
            _begun[id(work)] = work


def wait(work: Any, *args: Any, **kwargs: Any) -> bool:
    """`Work.wait`: of a work on NCCL it returns at once."""
    if _begun.pop(id(work), None) is None:
        return bool(_real_wait(work, *args, **kwargs))
    _unfinished.append(work)
    return True


def unfinished() -> tuple[Any, ...]:
    """Works that have been waited for, but are not known to be finished."""
    return tuple(_unfinished)


def finish_works() -> None:
    """Before any other operation: what follows on the device waits for a collective, whose failure is kept for later."""
    if not _unfinished:
        return
    with _finishing:
        while _unfinished:
            try:
                _real_wait(_unfinished[0])
            except RuntimeError as error:
                _fail(dist.DistBackendError(f"NCCL communicator was aborted: {str(error).splitlines()[0]}"))
            del _unfinished[0]


def _fail(error: BaseException) -> None:
    if _aborts:
        timer = threading.Timer(_ABORT_S, os.abort)
        timer.daemon = True
        timer.start()
    else:
        _late.append(error)


def raise_late() -> None:
    """At a wait of the host: tell what has failed on the device."""
    finish_works()
    if _late:
        raise _late.pop(0)
