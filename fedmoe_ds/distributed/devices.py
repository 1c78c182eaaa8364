"""Devices: which one this rank works on, the same for torch, DeepSpeed and NCCL, and no GPU under two ranks.

A launcher shows every rank of a host all of its GPUs (deepspeed, torchrun, mpirun), or each rank its own alone (srun
--gpus-per-task), where every rank's GPU is number 0. So a rank takes the one of its local rank among those that it sees, and
before any group is built all ranks compare what they have taken, through the store that they meet at: GPUs have ids of their
own, whatever number a process sees them under.
"""

from __future__ import annotations

import os
import socket
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.distributed.distributed_c10d import Store

from fedmoe_ds.distributed.meeting import decide
from fedmoe_ds.errors import UserError

_VARIABLE = "DS_ACCELERATOR"


def uses_cuda(device: str) -> bool:
    """What `topology.device` means here. DeepSpeed reads $DS_ACCELERATOR, so `auto` takes no GPU that it would not take."""
    if device == "auto":
        return (os.environ.get(_VARIABLE) or "cuda") == "cuda" and torch.cuda.is_available()
    return device == "cuda"


def own_device(device: str, local_rank: int) -> torch.device:
    """The device of the rank that its host counts as `local_rank`; from here on torch's own, and DeepSpeed's kind.

    Raises:
        UserError: cuda is asked for but absent, or `topology.device` and $DS_ACCELERATOR disagree.
    """
    chosen = os.environ.get(_VARIABLE) or None
    if chosen in ("cpu", "cuda") and device not in ("auto", chosen):
        raise UserError(
            f"topology.device: {device}: the environment has {_VARIABLE}={chosen}, which DeepSpeed goes by; unset it, or use "
            f"{chosen} or auto"
        )
    if "cuda" in (device, chosen) and not torch.cuda.is_available():
        field, fix = ("topology.device", "use cpu or auto") if device == "cuda" else (_VARIABLE, "unset it")
        raise UserError(f"{field}: cuda: no CUDA device is visible; {fix}")
    kind = "cuda" if uses_cuda(device) else "cpu"
    if chosen is None:
        os.environ[_VARIABLE] = kind
    if kind == "cpu":
        return torch.device("cpu")
    place = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(place)
    return place


@dataclass(frozen=True)
class Place:
    """What one rank has taken.

    Attributes:
        host: its name.
        kind: `cpu` or `cuda`.
        gpu: the GPU's own id; empty on the CPU.
        visible: GPUs that the rank sees.
        local_rank: by the launcher.
    """

    host: str
    kind: str
    gpu: str = ""
    visible: int = 0
    local_rank: int = 0

    @classmethod
    def of(cls, device: torch.device, local_rank: int) -> Place:
        if device.type != "cuda":
            return cls(socket.gethostname(), device.type, local_rank=local_rank)
        gpu = str(torch.cuda.get_device_properties(device).uuid)
        return cls(socket.gethostname(), device.type, gpu, torch.cuda.device_count(), local_rank)


def problem_of(places: Sequence[Place]) -> str | None:
    """What is wrong with the places of all ranks, in rank order, in one line."""
    kinds = [place.kind for place in places]
    if len(set(kinds)) > 1:
        with_gpu, without = kinds.index("cuda"), kinds.index("cpu")
        return (
            f"topology.device: auto: rank {with_gpu} on {places[with_gpu].host} sees a GPU and rank {without} on "
            f"{places[without].host} none; give every rank one, or use topology.device=cpu"
        )
    ranks_of = defaultdict(list)
    for rank, place in enumerate(places):
        if place.gpu:
            ranks_of[place.gpu].append(rank)
    shared = next((ranks for ranks in ranks_of.values() if len(ranks) > 1), None)
    return None if shared is None else _shared(places, shared)


def _shared(places: Sequence[Place], shared: list[int]) -> str:
    first = places[shared[0]]
    here = [place for place in places if place.host == first.host]
    ranks = len(here)
    gpus = len({place.gpu for place in here}) if first.visible == 1 else first.visible
    if ranks <= gpus:
        fix = f"LOCAL_RANK is {first.local_rank} on both; give each rank of a host another"
    else:
        fix = f"start at most {gpus} on a host, show each rank a GPU of its own, or use topology.device=cpu"
    some = " and ".join(map(str, shared[:2]))
    what = f"{ranks} ranks on {first.host} and {gpus} GPU{'s' * (gpus != 1)}"
    return f"topology.device: cuda: {what}: ranks {some} would share one; {fix}"


def check_places(store: Store, rank: int, world_size: int, place: Place) -> None:
    """Compare the places of all ranks. Every rank calls it, and all of them get the same answer.

    Args:
        store: that all ranks have met at.
    Raises:
        UserError: two ranks would share a GPU, or not all of them have one.
    """

    def refuse(views: list[dict[str, Any]]) -> None:
        if (problem := problem_of([Place(**view) for view in views])) is not None:
            raise UserError(problem)

    decide(store, rank, world_size, asdict(place), refuse)
