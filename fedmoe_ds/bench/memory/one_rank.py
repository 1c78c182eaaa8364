"""One rank that loads a model and says what that took, see `bench.harness.ranks`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from transformers.models.olmoe import modeling_olmoe  # noqa: F401  (its modules are no weights)

from fedmoe_ds.bench.harness.ranks import leave_answer, read_request
from fedmoe_ds.config import Config, TopologyConfig
from fedmoe_ds.distributed import process_groups
from fedmoe_ds.distributed.launcher import detect_launch
from fedmoe_ds.distributed.runtime import Runtime, init_runtime, run_entry
from fedmoe_ds.distributed.topology import build_topology
from fedmoe_ds.foundation.loading import load_model
from fedmoe_ds.machine import peak_mib, resident_mib


def main() -> int:
    request = read_request()
    runtime = init_runtime(detect_launch(), TopologyConfig(device="cpu", timeout_s=300.0))
    measure = measure_loading if request.pop("part") == "load" else measure_sharing
    leave_answer(measure(runtime, **request), runtime.rank)
    return 0


def measure_loading(runtime: Runtime, folder: str, ep_size: int) -> dict[str, float]:
    """MiB of a loaded share of the experts: resident before, peak, dense part, own experts and whole model."""
    process_groups.create_groups(ep_size)
    runtime.barrier()
    before = resident_mib()
    model, layers = load_model(Path(folder), torch.float32, ep_size, runtime.rank % ep_size, runtime.device)
    peak = peak_mib()
    own = sum(layer.w13.nbytes + layer.w2.nbytes for layer in layers)
    held = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    runtime.barrier()
    return {
        "before_mib": before,
        "peak_mib": peak,
        "dense_mib": (held - own) / 2**20,
        "own_experts_mib": own / 2**20,
        "model_mib": (held - own + own * ep_size) / 2**20,
    }


def measure_sharing(runtime: Runtime, tree: dict[str, Any]) -> dict[str, float]:
    """MiB that loading and reading all weights have added to this rank, and of them what is mapped from shared files."""
    from fedmoe_ds.federation.build import load_shared_foundation
    from fedmoe_ds.foundation.foundation import cache_folder
    from fedmoe_ds.foundation.host_sharing import FOLDER
    from fedmoe_ds.report import Progress

    config = Config.model_validate(tree)
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
