"""Resources: where the ranks of a study run, on this machine or in a SLURM allocation, and whether they have room there."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from fedmoe_ds.errors import UserError


def in_allocation(environment: Mapping[str, str]) -> bool:
    """Whether the study runs inside a SLURM job."""
    return "SLURM_JOB_ID" in environment


def check_capacity(label: str, ranks: int, environment: Mapping[str, str]) -> None:
    """Raises UserError when the allocation has fewer tasks than the point has ranks."""
    # SLURM_NPROCS is the older name; without either, srun itself decides.
    tasks = environment.get("SLURM_NTASKS", environment.get("SLURM_NPROCS"))
    if in_allocation(environment) and tasks is not None and int(tasks) < ranks:
        raise UserError(
            f"--ntasks: {tasks}: the point {label} needs {ranks} ranks; ask for an allocation of {ranks} tasks or leave it out"
        )


def cores(environment: Mapping[str, str]) -> int:
    """CPU cores that the ranks may use: those of the allocation on all of its nodes, else of this process."""
    listed = environment.get("SLURM_JOB_CPUS_PER_NODE") if in_allocation(environment) else None
    if listed is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # For instance 72(x2),36: two nodes with 72 cores and one with 36.
    return sum(int(count) * int(times or 1) for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", listed))
