"""Process groups of DeepSpeed: the world, and its expert-parallel and expert-data-parallel groups.

`deepspeed.utils.groups` is no public interface, hence the narrow DeepSpeed range in `pyproject.toml`.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import logging
import os
from collections.abc import Iterator
from typing import Any

import deepspeed
import deepspeed.comm
import torch
import torch.distributed as torch_dist
from deepspeed.utils import groups
from deepspeed.utils import logger as deepspeed_logger
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from fedmoe_ds.distributed.devices import Place, check_places
from fedmoe_ds.distributed.interfaces import use_common_network
from fedmoe_ds.distributed.open_files import Allowance, check_together
from fedmoe_ds.errors import UserError

_OPERATORS = "__compatible_ops__"
_NCCL = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}
"""torch's own watchdog would abort this process (SIGABRT) a moment after a peer is gone. Ours knows who it was and ends the job
with EXIT_LOST; until then the device stays in the collective, so nothing is computed from what never arrived."""
_LAZY = "TORCH_GLOO_LAZY_INIT"
"""gloo's ranks connect when they first exchange something. By itself gloo connects every rank of a group with every other, and
tells them how through the store: at 4 096 ranks 4 096 connections per rank and group, and 550 GB that the store serves."""
_limit: datetime.timedelta | None = None
"""How long a collective of the world may take; None: torch's own limit."""


def quiet_deepspeed() -> None:
    """Keep DeepSpeed's log lines below ERROR off the terminal, unless FEDMOE_DEBUG is set."""
    if not os.environ.get("FEDMOE_DEBUG"):
        deepspeed_logger.setLevel(logging.ERROR)


def has_world() -> bool:
    """Whether this process has joined one."""
    return bool(deepspeed.comm.is_initialized())


def join_world(
    timeout: datetime.timedelta,
    device: torch.device,
    interface: str | None = None,
    files: Allowance | None = None,
) -> str | None:
    """Join torch's world and DeepSpeed's, by the environment variables of this rank: NCCL between GPUs, else gloo.

    A world that is there already is taken as it is. Returns a line about the network that was chosen between several hosts.

    Args:
        interface: `topology.interface`.
        files: open files of this rank; None: nobody asks whether they are enough.
    Raises:
        UserError: the groups of a world that is there have a shorter limit; before any group is built, on all ranks: two ranks
            would share a GPU, a host has no such interface, or a rank has too few files.
    """
    global _limit
    os.environ.setdefault(_LAZY, "1")  # torch reads it when it makes a group
    if has_world() and _limit is not None:
        # Another run of a program under a launcher: the groups of its first run are there already.
        if timeout > _limit:
            raise UserError(
                f"topology.timeout_s: with topology.silence_s {timeout.total_seconds():g} s for a collective: the first run of "
                f"this process has made its groups for {_limit.total_seconds():g} s; give every run what the longest needs"
            )
        _compare_files(files)
        return None
    _limit = timeout
    backend = "nccl" if device.type == "cuda" else "gloo"
    network = None
    if not torch_dist.is_initialized():
        network = _join_torch(backend, timeout, device, interface, files)
    else:
        _compare_files(files)
    with _no_operators():
        # It takes torch's world as its own. By itself it would bind NCCL to the GPU of number LOCAL_RANK, which a rank that
        # sees its own GPU alone does not have.
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, timeout=timeout, verbose=False)
    return network


def _compare_files(files: Allowance | None) -> None:
    """The same check in a world that is there already."""
    if files is not None:
        store = torch_dist.distributed_c10d._get_default_store()
        check_together(store, torch_dist.get_rank(), torch_dist.get_world_size(), files)


def _join_torch(
    backend: str, timeout: datetime.timedelta, device: torch.device, interface: str | None, files: Allowance | None
) -> str | None:
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    if files is not None:
        check_together(store, rank, world_size, files)
    place: dict[str, Any] = {}
    network = None
    if world_size > 1:
        check_places(store, rank, world_size, Place.of(device, int(os.environ.get("LOCAL_RANK", "0"))))
        # gloo and NCCL read their interfaces when the first group is made.
        network = use_common_network(store, rank, world_size, interface)
        # NCCL connects now and not in the first collective. One rank has nobody to connect to.
        place = {"device_id": device} if backend == "nccl" else {}
        for name, value in _NCCL.items():
            os.environ.setdefault(name, value)
    torch_dist.init_process_group(
        backend, store=PrefixStore("world", store), rank=rank, world_size=world_size, timeout=timeout, **place
    )
    return network


@contextlib.contextmanager
def _no_operators() -> Iterator[None]:
    """Let DeepSpeed find none of its compiled operators while it joins.

    On CPU it would compile one (half a minute) that maps 66 MiB of shared memory per rank and leaves the files in /dev/shm when
    the run ends; only an all-reduce of its inference engine uses it. To find out whether it can, it asks the compiler about all
    of its operators, which without $CUDA_HOME prints a warning for every one that needs it.
    """
    names, before = vars(deepspeed.ops), vars(deepspeed.ops).get(_OPERATORS)
    names[_OPERATORS] = {}
    try:
        yield
    finally:
        del names[_OPERATORS]  # who asks for them later makes DeepSpeed look
        if before is not None:
            names[_OPERATORS] = before


def leave_world(end: bool) -> None:
    """Forget DeepSpeed's groups, and end the world itself with `end`: this process may join another one."""
    global _limit
    _limit = None
    if end and has_world():
        deepspeed.comm.destroy_process_group()
    else:
        groups._release_process_group_references()


def forget_communication() -> None:
    """Put DeepSpeed's record of collectives, and what it records of them, back to how a process begins."""
    logger = deepspeed.comm.comm.comms_logger
    vars(logger).update(vars(type(logger)()))


@contextlib.contextmanager
def _limited_groups() -> Iterator[None]:
    """Give every group that is created the world's limit: DeepSpeed passes none on, so its groups would have torch's own, half
    an hour with gloo and ten minutes with NCCL."""
    create = torch_dist.new_group
    # DeepSpeed looks new_group up in this module at each call, so the patch reaches it.
    torch_dist.new_group = functools.partial(create, timeout=_limit)
    try:
        yield
    finally:
        torch_dist.new_group = create


def create_groups(ep_size: int) -> tuple[Any, Any]:
    """Create (once) DeepSpeed's groups and return this rank's (expert-parallel, expert-data-parallel) process group.

    The first holds the ep_size consecutive ranks with the same rank // ep_size, the second all ranks with the same
    rank % ep_size. Their collectives have the limit that `join_world` was given. `deepspeed.comm` must be initialised, and
    every rank must call this.
    """
    quiet_deepspeed()
    assert deepspeed.comm.is_initialized(), "initialise deepspeed.comm before building groups"
    assert deepspeed.comm.get_world_size() % ep_size == 0, (deepspeed.comm.get_world_size(), ep_size)
    name = f"ep_size_{ep_size}"
    if name not in groups._get_expert_parallel_group_dict():
        with _limited_groups():
            groups._create_expert_and_data_parallel(expert_parallel_size_=ep_size)
    return groups._get_expert_parallel_group(name), groups._get_expert_data_parallel_group(name)
