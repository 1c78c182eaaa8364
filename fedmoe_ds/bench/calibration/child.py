"""Child: what calibration measures in processes of their own, alone or on several ranks, see `bench.harness.ranks`.

The calls are those of training: passes of a cluster with its token all-to-alls, the all-reduce of aggregation, the control
plane.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fedmoe_ds.bench.calibration.kernels import known_units, narrow_gain
from fedmoe_ds.bench.calibration.waves import activation_slack, pass_samples, pass_samples_together, stage_samples, write_models
from fedmoe_ds.bench.harness.ranks import leave_answer, read_request
from fedmoe_ds.config import TopologyConfig
from fedmoe_ds.distributed import process_groups
from fedmoe_ds.distributed.collectives import all_reduce_sum
from fedmoe_ds.distributed.launcher import detect_launch
from fedmoe_ds.distributed.runtime import Runtime, init_runtime, run_entry

SIZES = (1 << 8, 1 << 14, 1 << 18, 1 << 21)
REPEATS = (60, 60, 30, 10)


def timed(runtime: Runtime, action: Callable[[], object], repeats: int) -> float:
    """Median seconds of one call, after a few to warm up."""
    for _ in range(5):
        action()
    runtime.gather(None)  # all ranks start at once
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def collectives(runtime: Runtime) -> dict[str, list[tuple[int, float]]]:
    size = runtime.world_size
    group, _ = process_groups.create_groups(size)
    found: dict[str, list[tuple[int, float]]] = {"all_reduce": [], "control": []}
    for count, repeats in zip(SIZES, REPEATS, strict=True):
        total = torch.zeros(count // 4)
        found["all_reduce"].append((count, timed(runtime, lambda t=total: all_reduce_sum(t, group, size), repeats)))  # type: ignore[misc]
        if count <= 1 << 18:
            payload = b"x" * count
            found["control"].append((count, timed(runtime, lambda p=payload: runtime.control.gather(p), repeats)))  # type: ignore[misc]
    return found


def passes(runtime: Runtime, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Passes of a cluster that is the whole world, and of ranks that only compute side by side, as samples in plain JSON."""
    group, _ = process_groups.create_groups(runtime.world_size)
    together = pass_samples_together(group, runtime.world_size, runtime.rank, folder)
    apart = pass_samples_together(None, 1, 0, folder)
    return {"together": [asdict(sample) for sample in together], "apart": [asdict(sample) for sample in apart]}


def cluster(folder: str) -> dict[str, Any]:
    """Samples of passes, and for every collective rows of (bytes handed over, seconds of one call)."""
    runtime = init_runtime(detect_launch(), TopologyConfig(device="cpu"), 1)
    return {**passes(runtime, Path(folder)), **collectives(runtime)}


def alone() -> dict[str, Any]:
    """Passes and stages of a round, and units that are known by themselves."""
    samples, known = pass_samples(), known_units()
    stages, gain = stage_samples(), narrow_gain()
    return {"samples": [asdict(sample) for sample in samples], "stages": stages, "known": known, "narrow_gain": gain}


PARTS: dict[str, Callable[..., Any]] = {
    "models": lambda folder: write_models(Path(folder)),
    "cluster": cluster,
    "waves": alone,
    "slack": activation_slack,
}


def main() -> int:
    request = read_request()
    leave_answer(PARTS[request.pop("part")](**request), int(os.environ.get("RANK", "0")))
    return 0


if __name__ == "__main__":
    run_entry(main)
