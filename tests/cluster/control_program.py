"""Run by mpirun: the control plane over MPI and over gloo in the same processes, and what each of them answers."""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI

from fedmoe_ds.config import TopologyConfig
from fedmoe_ds.distributed.control import Control
from fedmoe_ds.distributed.control_plane import make_control
from fedmoe_ds.distributed.launcher import detect_launch
from fedmoe_ds.distributed.runtime import init_runtime, run_entry


def answers(control: Control) -> dict[str, Any]:
    """What every method gives, for the world and for clusters of two."""
    rank = control.rank
    inside = control.split(range(rank - rank % 2, rank - rank % 2 + 2), f"cluster {rank // 2}")
    draw = torch.Generator().manual_seed(rank)
    integers = torch.randint(-(2**40), 2**40, (3, 1001), generator=draw)
    disjoint = torch.zeros(control.size, 5, dtype=torch.float32)
    disjoint[rank] = torch.randn(5, generator=draw)
    empty = torch.zeros(0)
    payload = bytes([rank]) * (1000 * rank)  # rank 0 has nothing to say
    return {
        "place": [rank, control.size, inside.rank, inside.size],
        "broadcast": [control.broadcast(bytes([rank + 1]) * size).hex() for size in (0, 3, 100_000)],
        "gather": [part.hex() for part in control.gather(payload)],
        "inside": [part.decode() for part in inside.gather(f"{rank}!".encode())],
        "integers": control.sum(integers.clone()).tolist(),
        "disjoint": [value.hex() for value in control.sum(disjoint).flatten().tolist()],
        "inside sum": inside.sum(integers.clone()).tolist(),
        "empty": control.sum(empty).tolist(),
    }


def _refuse(*_: Any) -> Any:
    raise AssertionError("mpi4py pickles")


def main() -> int:
    MPI.pickle.__init__(_refuse, _refuse)  # also for the ranks' first meeting, in `detect_launch`
    launch = detect_launch()
    runtime = init_runtime(launch, TopologyConfig(device="cpu", timeout_s=60.0))
    found = {}
    for kind in ("mpi", "torch"):
        control = make_control(kind, launch.launcher, launch.rank, launch.world_size, timedelta(seconds=60))
        found[kind] = {"class": type(control).__name__, **answers(control)}
    Path(sys.argv[1], f"rank-{launch.rank}.json").write_text(json.dumps({"own": type(runtime.control).__name__, **found}))
    return 0


if __name__ == "__main__":
    run_entry(main)
