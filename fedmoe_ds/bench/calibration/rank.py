"""Calibrate rank: one of several real processes that time collectives together. `python -m fedmoe_ds.bench.calibration.rank`.

The calls are those of training: passes of a cluster with its token all-to-alls, the all-reduce of aggregation, the control
plane. The argument is a folder with the models. Rank 0 prints one JSON line: samples of passes, and for every collective rows
of [bytes handed over, seconds of one call].
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedmoe_ds.bench.calibration.waves import pass_samples_together
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
    runtime.gather(None)
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def measure(runtime: Runtime) -> dict[str, list[tuple[int, float]]]:
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


def _number(value: Any) -> float:
    assert isinstance(value, np.number), type(value)
    return float(value)


def main() -> int:
    runtime = init_runtime(detect_launch(), TopologyConfig(device="cpu"), 1)
    found: dict[str, Any] = {**passes(runtime, Path(sys.argv[1])), **measure(runtime)}
    if runtime.is_main:
        sys.stdout.write(json.dumps(found, default=_number) + "\n")
    return 0


if __name__ == "__main__":
    run_entry(main)
