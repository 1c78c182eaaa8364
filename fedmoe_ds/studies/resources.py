"""Resources: where the ranks of a study run, on this machine or in a SLURM allocation, and whether they have room there."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping

from fedmoe_ds.errors import UserError


def in_allocation(environment: Mapping[str, str]) -> bool:
    """Whether the study runs inside a SLURM job."""
    return "SLURM_JOB_ID" in environment


def check_capacity(label: str, ranks: int, environment: Mapping[str, str]) -> None:
    """Raises UserError when the allocation has fewer tasks than the point has ranks, or consists of several kinds of nodes."""
    if in_allocation(environment) and "SLURM_HET_SIZE" in environment:
        raise UserError(
            f"SLURM_HET_SIZE: {environment['SLURM_HET_SIZE']}: a heterogeneous job, of which a step would use the first "
            "component alone; ask for nodes of one kind with one set of options"
        )
    # SLURM_NPROCS is the older name; without either, srun itself decides.
    tasks = environment.get("SLURM_NTASKS", environment.get("SLURM_NPROCS"))
    if in_allocation(environment) and tasks is not None and int(tasks) < ranks:
        raise UserError(
            f"--ntasks: {tasks}: the point {label} needs {ranks} ranks; ask for an allocation of {ranks} tasks or leave it out"
        )


def step_options(ranks: int, environment: Mapping[str, str]) -> list[str]:
    """Options of srun for so many ranks in an allocation: on the first of its nodes, as few as hold them, filled one by one.

    Left to itself srun spreads a step over all nodes of the allocation, and a point of few ranks would measure the network.
    `--ntasks-per-node` does not fit a number of ranks that is no multiple of it; planes of so many tasks do.
    """
    tasks = _listed(environment.get("SLURM_TASKS_PER_NODE", ""))
    held = list(itertools.accumulate(tasks))
    if not held or held[-1] < ranks:
        return [f"--ntasks={ranks}"]  # no allocation that says it; srun decides, or refuses
    nodes = next(count for count, sum_ in enumerate(held, 1) if sum_ >= ranks)
    return [f"--nodes={nodes}", f"--ntasks={ranks}", f"--distribution=plane={max(tasks[:nodes])}"]


def cores(environment: Mapping[str, str]) -> int:
    """CPU cores that the ranks may use: those of the allocation on all of its nodes, else of this process."""
    listed = environment.get("SLURM_JOB_CPUS_PER_NODE") if in_allocation(environment) else None
    if listed is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return sum(_listed(listed))


def _listed(text: str) -> list[int]:
    """What SLURM says of every node: 72(x2),36 are two nodes with 72 and one with 36."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(count) for count, times in found for _ in range(int(times or 1))]
