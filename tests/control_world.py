"""Worlds of light processes: `python tests/control_world.py` reads a line `[ranks, limits, folder, dies]` for each.

It forks ranks that have imported all they need, limits their open files (rank 0, rank 1 and so on; the last limit is that of
all further ones), and lets them join, talk and leave. Every rank writes `rank-N.json` with what it found; exit codes are in
`codes.json`, what ranks print in `output`. Rank `dies`, if any, is killed before it has talked to most of the others. The
answer to a line is the largest exit code."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from fedmoe_ds.config import TopologyConfig
from fedmoe_ds.distributed import (
    open_files,
    process_groups,  # noqa: F401  (once for all ranks: it takes seconds)
    runtime,
)
from fedmoe_ds.distributed.control import Control
from fedmoe_ds.distributed.gloo_control import gloo_control
from fedmoe_ds.distributed.launcher import detect_launch, free_port
from fedmoe_ds.distributed.runtime import init_runtime, run_entry
from fedmoe_ds.distributed.topology import build_topology

SMALL = 13
"""Ranks that also talk as a tree in every shape, and as one group."""


def answers(control: Control) -> dict[str, Any]:
    """What every method gives to this rank."""
    rank, size = control.rank, control.size
    draw = torch.Generator().manual_seed(rank)
    integers = torch.randint(-(2**40), 2**40, (3, 7), generator=draw)
    disjoint = torch.zeros(size, 5)
    disjoint[rank] = torch.randn(5, generator=draw)
    half = range(size // 2) if rank < size // 2 else range(size // 2, size)
    inside = control.split(half, "a half")
    return {
        "place": [rank, size, inside.rank, inside.size],
        "gather": [part.decode() for part in control.gather(b"%d!" % rank)],
        "long": [len(part) for part in control.gather(bytes(100 * (rank % 5)))],  # some fit into the first message, some not
        "empty": [len(part) for part in control.gather(b"")],
        "broadcast": control.broadcast(b"from %d" % rank).decode(),
        "broadcast long": len(control.broadcast(bytes(1000 + rank))),
        "sum": control.sum(integers.clone()).tolist(),
        "disjoint": [value.hex() for value in control.sum(disjoint).flatten().tolist()],
        "largest": control.largest(integers.clone()).tolist(),
        "no numbers": control.sum(torch.zeros(0)).tolist(),
        "inside": [part.decode() for part in inside.gather(b"%d" % rank)],
    }


def body(folder: Path, limit: int, dies: int | None) -> int:
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(limit, 200), limit))
    launch = detect_launch()
    before = len(os.listdir("/proc/self/fd"))
    world = init_runtime(launch, TopologyConfig(device="cpu"))
    topology = build_topology(TopologyConfig(device="cpu"), world)
    if launch.rank == dies:
        os.kill(os.getpid(), signal.SIGKILL)
    topology.sum_shard.sum(torch.ones(1000))
    found = {"control": type(world.control).__name__, "world": answers(world.control)}
    found["files"] = len(os.listdir("/proc/self/fd")) - before
    found["soft"] = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if launch.rank < SMALL and launch.world_size >= SMALL:
        for flat in (SMALL, 4, 1):
            control = gloo_control(range(SMALL), "some", timedelta(minutes=2), flat)
            found[f"flat {flat}"] = {"class": type(control).__name__, **answers(control)}
    (folder / f"rank-{launch.rank}.json").write_text(json.dumps(found))
    world.barrier()
    return 0


def main(ranks: int, limits: list[int], folder: Path, dies: int | None = None) -> int:
    torch.set_num_threads(1)
    # Nobody is ended by a launcher here, and a rank without rank 0 is to find that out soon.
    runtime._SAY_S, open_files._ANSWER_S = 0.1, 2.0
    os.environ.update(WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    children = []
    for rank in range(ranks):
        child = os.fork()
        if not child:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            limit = limits[min(rank, len(limits) - 1)]
            run_entry(lambda limit=limit: body(folder, limit, dies))  # type: ignore[misc]
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    (folder / "codes.json").write_text(json.dumps(codes))
    return max(codes)


def serve() -> None:
    """One world after another, each in a process of its own: importing takes longer than most worlds."""
    for line in sys.stdin:
        ranks, limits, folder, dies = json.loads(line)
        child = os.fork()
        if not child:
            output = os.open(Path(folder) / "output", os.O_WRONLY | os.O_CREAT, 0o600)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os._exit(main(ranks, limits, Path(folder), dies))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
