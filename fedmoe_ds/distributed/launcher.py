"""Launcher: which process of which world this is, whoever started it.

The same script runs under plain `python`, `deepspeed`, `torchrun`, `mpirun` and `srun`. `detect_launch` reads what the launcher
promised, and refuses a world that is smaller than the promise.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
from dataclasses import dataclass

from fedmoe_ds.distributed.address import choose_rendezvous
from fedmoe_ds.errors import UserError

_SLURM_PSEUDO_STEPS = 0xFFFFFFF0
"""Step ids from here on are no steps of srun: batch script, interactive shell of salloc, and so on (slurm.h)."""


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
    # These two come first: torchrun, deepspeed and the supervisor set them inside allocations of SLURM, too. Only
    # DeepSpeed's launcher sets CROSS_RANK.
    if "RANK" in env and "WORLD_SIZE" in env:
        launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in env else "deepspeed" if "CROSS_RANK" in env else "environment"
        return Launch(launcher, int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)))
    under_slurm = "SLURM_STEP_ID" in env and env.get("PMI_SIZE") == env.get("SLURM_STEP_NUM_TASKS")  # srun --mpi=pmi2
    if "OMPI_COMM_WORLD_SIZE" in env or ("PMI_SIZE" in env and not under_slurm):
        return _detect_mpi(int(env.get("OMPI_COMM_WORLD_SIZE", env.get("PMI_SIZE", "1"))))
    if int(env.get("SLURM_STEP_ID", _SLURM_PSEUDO_STEPS)) < _SLURM_PSEUDO_STEPS and "SLURM_PROCID" in env:
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
    # Ranks that can share memory, that is those of one host, whatever mpirun calls them.
    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    address, port = choose_rendezvous(world, local)
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    return Launch("mpirun", world.rank, world.size, local.rank)


def _detect_slurm() -> Launch:
    """A task of a step. Rank 0 runs on the step's first node; SLURM_LAUNCH_NODE_IPADDR is where srun was typed."""
    env = os.environ
    world = int(env.get("SLURM_STEP_NUM_TASKS", env["SLURM_NTASKS"]))
    promised = int(env.get("SLURM_NTASKS", world))
    if world < promised:
        raise UserError(
            f"SLURM_NTASKS: {promised}: srun promised {promised} tasks but this step has {world}; start all with one srun"
        )
    if "MASTER_ADDR" not in env:
        single = env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES", "1")) == "1"
        env["MASTER_ADDR"] = "127.0.0.1" if single else _node_address(_first_node())
    # Every task computes the same port from the ids of job and step: there is nobody yet to ask.
    env.setdefault("MASTER_PORT", str(slurm_port(int(env["SLURM_JOB_ID"]), int(env.get("SLURM_STEP_ID", 0)))))
    return Launch("srun", int(env["SLURM_PROCID"]), world, int(env.get("SLURM_LOCALID", 0)))


def slurm_port(job: int, step: int) -> int:
    """The rendezvous port of a step: below the ports that Linux gives to outgoing connections, apart for neighbouring jobs."""
    return 12000 + (job * 16 + step % 16) % 20000


def _first_node() -> str:
    """The node of rank 0. The node list of a heterogeneous step is sorted, and its first component may be on a later one."""
    env = os.environ
    nodes = env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"]
    if "SLURM_HET_SIZE" in env:
        inside = _scontrol("show", "hostnames", nodes).split()
        groups = [name for name in env if re.fullmatch(r"SLURM_JOB_NODELIST_(HET|PACK)_GROUP_\d+", name)]
        for name in sorted(groups, key=lambda name: int(name.rpartition("_")[2])):
            if (first := _scontrol("show", "hostnames", env[name]).split()[0]) in inside:
                return first
    head = re.match(r"(\[[^\]]*\]|[^,\[])+", nodes)  # up to the first comma outside of brackets
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", head[0]) if head else nodes  # node[03-07,12] -> node03


def _node_address(name: str) -> str:
    """Where a node is reached: its name if that resolves, otherwise (cloud and virtual nodes) the NodeAddr that SLURM uses."""
    try:
        socket.getaddrinfo(name, None)
        return name
    except OSError:
        found = re.search(r"\bNodeAddr=(\S+)", _scontrol("-o", "show", "node", name))
    if found is None:
        raise UserError(
            f"MASTER_ADDR: {name}: neither does this name resolve nor does SLURM know its address; export MASTER_ADDR"
        )
    return found[1]


def _scontrol(*arguments: str) -> str:
    try:
        return subprocess.run(["scontrol", *arguments], capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"MASTER_ADDR: scontrol {' '.join(arguments)}: {error}; export MASTER_ADDR and MASTER_PORT") from None


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
