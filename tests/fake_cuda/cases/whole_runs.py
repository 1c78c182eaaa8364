"""Whole runs on a device: one that is resumed, and `bench wave`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from federations import Result, finish, make_config

from fake_cuda.runs import losses, on_device, root, run_on_device
from fedmoe_ds.bench.harness.shapes import Shape, write_model
from fedmoe_ds.bench.harness.system import AGREEMENT, OURS, check_agreement
from fedmoe_ds.bench.harness.workload import Workload
from fedmoe_ds.bench.wave.worker import make_worker
from fedmoe_ds.config import Config
from fedmoe_ds.federation import session
from fedmoe_ds.federation.build import load_parts
from fedmoe_ds.federation.journal import Journal

FAST: dict[str, Any] = {
    "execution": {"reproducible": "fast", "clients_in_flight": 4, "micro_batch_size": None},
    "federation": {"participation": 0.5},
    "local": {"max_steps": 1},
    "evaluation": {"every": 1, "max_sequences": 2, "client_sequences": 0},
}


def resumed(config: Config) -> Result:
    """Go on from the last checkpoint of a run, as `--resume auto` does."""
    runtime, topology = on_device()
    folder = Path(config.output) / config.name
    source = session.claim_folder(folder, "auto")
    journal = Journal(folder, runtime)
    parts = load_parts(config, runtime, topology, journal.progress)
    session.begin(parts, journal, source["checkpoint"])
    return finish(parts, journal)


def case_resume(fake: Any) -> None:
    """Server optimizer and personal state come back onto the device; what follows is as if nobody had stopped."""
    drift = {"method": {"name": "fedit"}, "local": {"drift": "fedprox"}, "server": {"optimizer": "fedadam"}}
    short, long = {"federation": {"rounds": 1}}, {"federation": {"rounds": 2}}
    whole = run_on_device(make_config(root(), "whole", FAST, drift, long))
    run_on_device(make_config(root(), "stopped", FAST, drift, short))
    result = resumed(make_config(root(), "stopped", FAST, drift, long))
    assert result.digest == whole.digest and losses(result)[-3:] == losses(whole)[-3:]


def case_bench_wave(fake: Any) -> None:
    """`launch/bench.py wave --device cuda` on a small shape: our losses are those of transformers and PEFT. Its floor is left
    out: it multiplies buffers that are sized for a real device's caches."""
    load = Workload(Shape("small", 16, 64, 32, 1, 2, 128), 1, 1, 16, 0, caps=(8, 1), dtype="bfloat16", device="cuda")
    losses_of = {}
    write_model(load.shape, load.seed, root() / "bench", "5GB", load.dtype)
    for name in (OURS, "peft grouped_mm"):
        worker = make_worker(name)
        worker.open(name, str(root() / "bench"), load.to_json())
        losses_of[name] = worker.train("warm-up")["losses"]
        assert worker.peak() > 0
    check_agreement(losses_of, AGREEMENT[load.dtype])
