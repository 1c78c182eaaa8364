"""One rank that loads a foundation as runs do: `python -m fedmoe_ds.bench.memory.one_rank REQUEST FOLDER` under a launcher."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from fedmoe_ds.bench.harness.ranks import answer_file
from fedmoe_ds.config import Config
from fedmoe_ds.distributed.launcher import detect_launch
from fedmoe_ds.distributed.runtime import Runtime, init_runtime, run_entry
from fedmoe_ds.distributed.topology import build_topology
from fedmoe_ds.federation.build import load_shared_foundation
from fedmoe_ds.foundation.foundation import cache_folder
from fedmoe_ds.foundation.host_sharing import FOLDER
from fedmoe_ds.machine import peak_mib, resident_mib
from fedmoe_ds.report import Progress


def main() -> int:
    config, folder = Config.model_validate(json.loads(sys.argv[1])["config"]), Path(sys.argv[2])
    runtime = init_runtime(detect_launch(), config.topology)
    answer_file(folder, runtime.rank).write_text(json.dumps(measure(config, runtime)))
    return 0


def measure(config: Config, runtime: Runtime) -> dict[str, float]:
    """MiB that loading and reading all weights have added to this rank, and of them what is mapped from shared files."""
    topology = build_topology(config.topology, runtime)
    process = psutil.Process()
    resident_mib()  # the peak counts from here
    runtime.barrier()
    before, began = process.memory_full_info(), time.perf_counter()
    foundation = load_shared_foundation(config, runtime, topology, Progress(enabled=False))
    seconds = time.perf_counter() - began
    weights = {parameter.data_ptr(): parameter for parameter in foundation.model.parameters()}.values()
    assert all(weight.sum().isfinite() for weight in weights)  # reads every page, without temporaries
    runtime.barrier()
    after, peak = process.memory_full_info(), peak_mib()
    found = {f"{name}_growth_mib": (getattr(after, name) - getattr(before, name)) / 2**20 for name in ("rss", "pss", "uss")}
    shared = str(cache_folder(config.foundation, FOLDER))
    maps = [one for one in process.memory_maps(grouped=True) if one.path.startswith(shared)]
    found["mapped_pss_mib"] = sum(one.pss for one in maps) / 2**20
    found["mapped_private_mib"] = sum(one.private_clean + one.private_dirty for one in maps) / 2**20
    runtime.barrier()  # nobody may leave before all have looked
    size = sum(weight.nbytes for weight in weights) / 2**20
    return {"peak_mib": peak, "resident_mib": after.rss / 2**20, "weights_mib": size, "load_s": seconds, **found}


if __name__ == "__main__":
    run_entry(main)
