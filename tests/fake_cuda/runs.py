"""Runs: small federations on the stand-in's device, for cases."""

from __future__ import annotations

import atexit
import functools
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from dense_inputs import write_dense
from federations import Result, alone, build, finish

from fedmoe_ds.clients.local_training import WaveTrainer
from fedmoe_ds.config import Config
from fedmoe_ds.distributed.runtime import Runtime
from fedmoe_ds.distributed.topology import Topology


@functools.cache
def root() -> Path:
    """A folder with the inputs of `dense_inputs.write_dense`: all models and data. It goes with the process.

    Several ranks share it ($FAKE_FOLDER), and rank 0 writes it.
    """
    given = os.environ.get("FAKE_FOLDER")
    if given is None:
        folder = tempfile.TemporaryDirectory(prefix="fake-cuda-")
        atexit.register(folder.cleanup)
        given = folder.name
    if os.environ.get("RANK", "0") == "0":
        Path(given).mkdir(exist_ok=True)
        write_dense(Path(given), ("llama", "vit", "vit-rgb"))
    return Path(given)


def on_device() -> tuple[Runtime, Topology]:
    """A world of this process, on the current device."""
    runtime, topology = alone()
    return replace(runtime, device=torch.device("cuda", torch.cuda.current_device())), topology


def run_on_device(config: Config) -> Result:
    """A whole run on the device; nobody may have been left out of it."""
    result = finish(*build(config, *on_device()))
    assert [event for event in result.events if event.get("status") not in (None, "ok")] == []
    return result


def losses(result: Result) -> list[float]:
    """Of every evaluation, in the order of writing."""
    return [score[4] for score in result.scores()]


@dataclass
class Pass:
    """What one training pass on the device cost: waits by file of the project, uploads, and layers that it went through."""

    waits: Counter[str]
    uploads: int
    layers: int


@contextmanager
def passes_of(fake: Any) -> Iterator[list[Pass]]:
    """The training passes of the block."""
    found: list[Pass] = []
    real = WaveTrainer._run

    def run(self: WaveTrainer, *arguments: Any) -> None:
        waits, uploads = fake.COUNT.waits.copy(), fake.COUNT.uploads.copy()
        real(self, *arguments)
        places: Counter[str] = Counter()
        for (_, place), times in (fake.COUNT.waits - waits).items():
            places[place.partition(":")[0]] += times
        found.append(Pass(places, (fake.COUNT.uploads - uploads).total(), len(self.layers)))

    WaveTrainer._run = run  # type: ignore[method-assign]
    try:
        yield found
    finally:
        WaveTrainer._run = real  # type: ignore[method-assign]
