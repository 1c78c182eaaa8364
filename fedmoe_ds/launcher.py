"""Launcher: which process of which world this is, whoever started it.

The same script runs under plain `python`, `deepspeed`, `torchrun`, `mpirun` and `srun`. `detect_launch` reads what the launcher
promised, and refuses a world that is smaller than the promise.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from fedmoe_ds.errors import UserError


@dataclass(frozen=True)
class Launch:
    """What the launcher says about this process."""

    launcher: str
    rank: int
    world_size: int
    local_rank: int


def detect_launch() -> Launch:
    """Read rank and world from the environment. Raises UserError for a silent one-rank world under SLURM or MPI."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in env else "deepspeed" if "CROSS_RANK" in env else "environment"
        return Launch(launcher, int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)))
    under_slurm = "SLURM_STEP_ID" in env and env.get("PMI_SIZE") == env.get("SLURM_STEP_NUM_TASKS")  # srun --mpi=pmi2
    if "OMPI_COMM_WORLD_SIZE" in env or ("PMI_SIZE" in env and not under_slurm):
        return _detect_mpi(int(env.get("OMPI_COMM_WORLD_SIZE", env.get("PMI_SIZE", "1"))))
    if "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:
        return _detect_slurm()
    promised = int(env.get("SLURM_NTASKS", "1"))
    if promised > 1 and "SLURM_JOB_ID" in env:
        raise UserError(
            f"SLURM_NTASKS: {promised}: SLURM promised {promised} tasks but this process was started alone; start it with srun"
        )
    return Launch("python", 0, 1, 0)


def _detect_mpi(promised: int) -> Launch:
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    if world.size != promised:
        raise UserError(
            f"mpirun: {promised}: it promised {promised} ranks but mpi4py sees {world.size}; mpirun and mpi4py use different "
            "MPI libraries: put the matching mpirun first in PATH"
        )
    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    address, port = world.bcast((_own_address(local.size == world.size), free_port()), root=0)
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    return Launch("mpirun", world.rank, world.size, local.rank)


def _detect_slurm() -> Launch:
    env = os.environ
    world = int(env.get("SLURM_STEP_NUM_TASKS", env["SLURM_NTASKS"]))
    single = env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES", "1")) == "1"
    env.setdefault("MASTER_ADDR", "127.0.0.1" if single else env.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1"))
    env.setdefault("MASTER_PORT", str(20000 + int(env["SLURM_JOB_ID"]) % 20000))
    return Launch("srun", int(env["SLURM_PROCID"]), world, int(env.get("SLURM_LOCALID", 0)))


def _own_address(single_host: bool) -> str:
    if single_host:
        return "127.0.0.1"
    return socket.gethostbyname(socket.gethostname())


def free_port() -> int:
    """A TCP port of the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def known_rank() -> int:
    """This process's rank as far as the environment tells, for messages before there is a world."""
    for name in ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"):
        if name in os.environ:
            return int(os.environ[name])
    return 0
