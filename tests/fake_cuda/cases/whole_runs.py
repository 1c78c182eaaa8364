"""Whole runs on a device: one that is resumed, and `bench wave`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from every import every
from federations import Result, finish, make_config

from fake_cuda.runs import losses, on_device, root, run_on_device
from fedmoe_ds.bench.harness.shapes import Shape
from fedmoe_ds.bench.harness.system import OURS
from fedmoe_ds.bench.harness.worker import reply
from fedmoe_ds.bench.harness.workload import Workload
from fedmoe_ds.bench.wave import measure
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


class Here:
    """A worker of a benchmark in this process, asked as one in a process of its own."""

    def __init__(self, name: str) -> None:
        self.worker = make_worker(name)

    def ask(self, **request: Any) -> Any:
        return json.loads(reply(self.worker, request))["result"]


def case_bench_wave(fake: Any) -> None:
    """`launch/bench.py wave --device cuda` on the smallest shape: us, a peer whose losses are ours, and the floor."""

    @contextmanager
    def workers(module: str, names: list[str], device: str) -> Iterator[dict[str, Here]]:
        yield {name: Here(name) for name in names}

    load = Workload(Shape("small", 16, 64, 32, 1, 2, 128), 1, 1, 16, 0, caps=(8, 1), dtype="bfloat16", device="cuda")
    real, measure.workers = measure.workers, workers  # type: ignore[assignment]
    try:
        rows = measure.run_wave([load], [OURS, "peft grouped_mm"], 1, lambda text: None)
    finally:
        measure.workers = real
    assert [row["system"] for row in rows] == [OURS, "peft grouped_mm"]
    assert every(row["peak_mib"] > 0 and row["device"] == "cuda" for row in rows)
