"""One rank of the aggregation benchmark, started by mpirun: `python -m fedmoe_ds.bench.aggregate_rank REQUEST ANSWER`.

Both files are JSON; rank 0 writes the answer. Every backend sums the same exact statistics in the same processes.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from fedmoe_ds.adapters.bank import BlockSpec
from fedmoe_ds.aggregation.statistics import Statistics
from fedmoe_ds.bench.aggregate import BACKENDS
from fedmoe_ds.collectives import Summing, TorchSumming
from fedmoe_ds.config import TopologyConfig
from fedmoe_ds.launcher import detect_launch
from fedmoe_ds.runtime import Runtime, init_runtime, run_entry
from fedmoe_ds.topology import build_topology

_FILL = 8  # item numbers of one (layer, expert) in the statistics that are summed


def main() -> int:
    request = json.loads(Path(sys.argv[1]).read_text())
    config = TopologyConfig(device="cpu", timeout_s=300.0)
    runtime = init_runtime(detect_launch(), config)
    summings = {name: build_topology(config.model_copy(update={"aggregation": name}), runtime).sum_shard for name in BACKENDS}
    rows = [row for mib in request["mib"] for row in measure(runtime, summings, mib, request["rounds"])]
    if runtime.is_main:
        Path(sys.argv[2]).write_text(json.dumps(rows))
    return 0


def measure(runtime: Runtime, summings: dict[str, Summing], mib: int, rounds: int) -> list[dict[str, float | str]]:
    """Seconds of the slowest rank per backend for `mib` MiB of sums: the sum alone, and the whole reduction."""
    spec = BlockSpec("bench", tuple(range(8)), (_FILL, mib * 2**20 // (8 * 8 * _FILL * 2)), expert=True)
    statistics = Statistics([spec], 1, exact=True)
    size = sum(tensor.nbytes for _, _, _, tensor in statistics.tensors())
    flat = torch.zeros(size // 8, dtype=torch.int64)
    into = torch.empty_like(flat)
    copy_s = slowest(runtime, lambda: into.copy_(flat), rounds)
    rows: list[dict[str, float | str]] = []
    for name, summing in summings.items():
        sum_s = slowest(runtime, lambda: summing.sum(flat), rounds)  # noqa: B023  (called at once)
        reduce_s = slowest(runtime, lambda: statistics.reduce(TorchSumming(None, 1), summing), rounds)  # noqa: B023
        rows.append({"backend": name, "bytes": size, "copy_s": copy_s, "sum_s": sum_s, "reduce_s": reduce_s})
    return rows


def slowest(runtime: Runtime, action: Callable[[], object], rounds: int) -> float:
    """Median over rounds of the slowest rank's seconds; all ranks work at the same time, as in a run."""
    action()
    times = []
    for _ in range(rounds):
        runtime.barrier()
        began = time.perf_counter()
        action()
        times.append(max(runtime.gather(time.perf_counter() - began)))
    return float(median(times))


if __name__ == "__main__":
    run_entry(main)
