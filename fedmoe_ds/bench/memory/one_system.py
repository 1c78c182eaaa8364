"""One system with its clients, in a process of its own, see `bench.harness.ranks`."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedmoe_ds.bench.harness.ranks import leave_answer, read_request
from fedmoe_ds.bench.harness.system import BITWISE, HALF_MOMENTS, OURS
from fedmoe_ds.bench.harness.workload import Workload
from fedmoe_ds.bench.wave.worker import open_system
from fedmoe_ds.machine import peak_mib, resident_mib


def main() -> None:
    import torch

    torch.set_num_threads(1)
    leave_answer(measure(**read_request()))
    os._exit(0)  # no atexit handler may wait for peers


def measure(system: str, folder: str, workload: dict[str, Any]) -> dict[str, Any]:
    """Load, train two waves, and return MiB: once loaded, at the peak of training, and after it."""
    model, load = Path(folder), Workload.from_json(workload)
    if system == HALF_MOMENTS:
        system, load = OURS, replace(load, moments="bfloat16")
    running = open_system(system, model, load)
    loaded = resident_mib()
    for stage in ("warm-up", "timed"):  # the second wave finds memory as the first one has left it
        running.train(stage)
    peak = peak_mib()
    resident = resident_mib()  # which may take a page more than the peak before it
    answer = {"loaded_mib": loaded, "peak_mib": max(peak, resident), "resident_mib": resident}
    ours = system in (OURS, BITWISE)
    return {**answer, "counted_mib": counted(model, load, system == BITWISE) if ours else None}


def counted(folder: Path, workload: Workload, bitwise: bool) -> dict[str, float]:
    """MiB that one more client of a wave takes, by purpose: exact arithmetic on shapes, activations tensor by tensor."""
    import torch

    from fedmoe_ds.config import Config
    from fedmoe_ds.federation.run_spec import resolve_spec
    from fedmoe_ds.foundation.meta_model import build_on_meta, host_model
    from fedmoe_ds.foundation.outline import outline
    from fedmoe_ds.methods import method_for
    from fedmoe_ds.planner.memory import PASS, estimate

    adapters = {"rank": workload.rank, "alpha": workload.alpha, "attention": list(workload.attention)}
    local = {"batch_size": workload.sequences, "moments": workload.moments}
    execution = {"reproducible": "bitwise" if bitwise else "fast"}
    config = Config.model_validate({"adapters": adapters, "local": local, "execution": execution, "method": {"name": "fedit"}})
    model = build_on_meta(folder, torch.float32)
    spec = resolve_spec(config, method_for(config), "cpu", outline(model, host_model(model, 1, 0)))
    one, two = (estimate(spec, n, workload.length, together=n if spec.shares_passes else 1) for n in (1, 2))
    more = {purpose: (two[purpose] - one[purpose]) / 2**20 for purpose in one}
    in_flight, moments, activations = more.pop("adapters in flight"), more.pop("client optimizer"), more.pop(PASS)
    assert not any(more.values()), more
    return {"adapters": in_flight / 2, "gradients": in_flight / 2, "moments": moments, "activations": activations}


if __name__ == "__main__":
    main()
