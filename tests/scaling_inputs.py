"""Inputs of the tests of scaling studies: a study of a small federation, and runs as if they had been run."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedmoe_ds.config import dump_config
from fedmoe_ds.studies.scaling import Request, scale
from fedmoe_ds.studies.scaling.measured import machine_file
from fedmoe_ds.studies.scaling.point import Point, plan_points
from fedmoe_ds.studies.scaling.study import read_study

NOWHERE = Path("no-such-script.py")


def write_study(folder: Path, **keys: Any) -> Path:
    path = folder / "study.yaml"
    path.write_text(json.dumps({"base": "base.yaml", "repeats": 1, **keys}))
    return path


def make_request(corpus: Path, cache: Path, folder: Path) -> Request:
    """Strong scaling over 1 and 2 ranks, two repeats, everything in `folder`; only shapes and data are looked at."""
    base = {
        "foundation": {"preset": "nano-olmoe", "cache": str(cache)},
        "federation": {"rounds": 3},
        "local": {"max_steps": 3},
        "data": {"source": str(corpus), "sequence_length": 64, "partition": {"kind": "iid", "clients": 4}},
    }
    (folder / "base.yaml").write_text(json.dumps(base))
    study = write_study(folder, axis="ranks", values=[1, 2], scaling="strong", repeats=2)
    return Request(study, folder / "runs")


def plan(request: Request) -> list[Point]:
    assert request.output is not None
    return plan_points(read_study(request.config), request.config, request.output, request.overrides)


def start(request: Request, script: Path = NOWHERE, notes: list[str] | None = None) -> tuple[int, str]:
    return scale(request, script, environment(), (notes if notes is not None else []).append)


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return kept | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} | more


def round_event(number: int, at: float, train: float, **more: Any) -> dict[str, Any]:
    phases = {"schedule": 0.25, "train": train, "aggregate": 0.5, "evaluate": 0.25}
    return {"event": "round", "time": at, "round": number, "tokens": 1200, "phases": phases, "seconds": train + 1.0} | more


def record_run(
    point: Point,
    repeat: int,
    seconds: float,
    *,
    digest: str = "ab",
    start: dict[str, Any] | None = None,
    ended: int = 3,
    **more: Any,
) -> None:
    """Write what a run of three rounds leaves behind: a slow first one, then two of `seconds` from event to event; `start` are
    further fields of its `run` event."""
    run = point.runs[repeat]
    topology = [{"rank": rank, "host": "here", "cluster": rank, "shard": 0, "experts": "0-7"} for rank in range(point.ranks)]
    facts = {"world_size": point.ranks, "clusters": point.ranks, "ep_size": 1, "clients": 4, "reproducible": "bitwise"}
    facts |= {"topology": topology, "versions": {"torch": "2.13"}, "device": "cpu", **(start or {})}
    events = [{"event": "run", "time": 90.0, **facts}]
    for number, at in ((1, 100.0), (2, 100.0 + seconds), (3, 100.0 + 2 * seconds)):
        events.append({"event": "client", "time": at, "round": number, "client": "a", "flops": 6.0e9})
        events.append(round_event(number, at, seconds - 2.0, **more))
    events.append({"event": "end", "time": 200.0, "rounds": ended, "digest": digest})
    run.folder.mkdir(parents=True)
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (run.folder / "config.yaml").write_text(dump_config(run.config))
    machine_file(run).write_text(json.dumps({"cores": 1, "cpu": "a CPU", "system_name": "an OS"}))


def record_all(request: Request, seconds: Sequence[Sequence[float]], **more: Any) -> None:
    for point, times in zip(plan(request), seconds, strict=True):
        for repeat, value in enumerate(times):
            record_run(point, repeat, value, **more)
