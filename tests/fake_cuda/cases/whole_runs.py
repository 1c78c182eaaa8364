"""Whole runs on a device: one that is resumed, and `bench wave`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from federations import Result, build, finish, make_config

from fake_cuda.runs import losses, on_device, root, run_on_device
from fedmoe_ds.bench.harness.shapes import Shape, write_model
from fedmoe_ds.bench.harness.system import AGREEMENT, OURS, check_agreement
from fedmoe_ds.bench.harness.workload import Workload
from fedmoe_ds.bench.wave.worker import make_worker
from fedmoe_ds.config import Config
from fedmoe_ds.federation import session
from fedmoe_ds.federation.build import load_parts
from fedmoe_ds.federation.journal import Journal
from fedmoe_ds.foundation import foundation

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
    parts = load_parts(config, runtime, topology, journal.progress, resume=source["checkpoint"])
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


def in_halves() -> Path:
    """The model of `make_config`, which says that it is stored in bfloat16."""
    folder = root() / "halves"
    if not folder.exists():
        shutil.copytree(root() / "model", folder)
        config = folder / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "bfloat16"}))
    return folder


def case_a_hub_id_is_loaded_as_its_model_is_stored(fake: Any) -> None:
    """Nobody knows it before it is downloaded."""
    real, folder = foundation.snapshot_download, str(in_halves())
    foundation.snapshot_download = lambda *argv, **kwargs: folder  # type: ignore[assignment]
    try:
        parts, journal = build(make_config(root(), "hub", FAST, {"foundation": {"path": "of/somebody"}}), *on_device())
    finally:
        foundation.snapshot_download = real
    journal.close()
    assert parts.config.foundation.dtype == "bfloat16"
    assert {weight.dtype for weight in parts.foundation.model.parameters()} == {torch.bfloat16}


def case_a_run_goes_on_in_the_type_that_it_has(fake: Any) -> None:
    """Runs of earlier versions left the type out, and were float32 with any model."""
    model, short = {"foundation": {"path": str(in_halves())}}, {"federation": {"rounds": 1}}
    run_on_device(make_config(root(), "before", FAST, model, short, {"foundation": {"dtype": "float32"}}))
    result = resumed(make_config(root(), "before", FAST, model))
    assert result.parts.config.foundation.dtype == "float32" and len(losses(result)) > 1


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
