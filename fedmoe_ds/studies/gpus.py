"""GPUs of a study: runs that are at work at once take different ones, as long as there are enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fedmoe_ds.distributed.devices import uses_cuda
from fedmoe_ds.studies.run import Run

VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """What runs may use, under the names of $CUDA_VISIBLE_DEVICES: those that it has, else all of this host."""
    named = environment.get(VISIBLE)
    if named is None:
        return [str(index) for index in range(torch.cuda.device_count())]
    return [name.strip() for name in named.split(",") if name.strip() not in ("", "-1")]


def gpus_of(run: Run, slot: int, environment: Mapping[str, str]) -> list[str]:
    """One for each rank of the run that is at work in this slot: another one than in the slots before, or shared in turn.

    Empty where the run takes none, or there are fewer than it has ranks, which it will say itself.
    """
    if not uses_cuda(run.config.topology.device):
        return []
    gpus = visible_gpus(environment)
    if run.ranks > len(gpus):
        return []
    return [gpus[(slot * run.ranks + rank) % len(gpus)] for rank in range(run.ranks)]


def launcher_options(ranks: int, gpus: Sequence[str]) -> list[str]:
    """How many ranks deepspeed's launcher starts. With a count it ignores $CUDA_VISIBLE_DEVICES, and takes the first GPUs."""
    if list(gpus) in ([], [str(rank) for rank in range(ranks)]):
        return ["--num_accelerators", str(ranks)]
    return ["--include", f"localhost:{','.join(gpus)}"]
