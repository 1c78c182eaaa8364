"""Runs: small federations on the stand-in's device, for cases."""

from __future__ import annotations

import atexit
import functools
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from dense_inputs import write_dense
from federations import Result, alone, build, finish

from fedmoe_ds.config import Config
from fedmoe_ds.distributed.runtime import Runtime
from fedmoe_ds.distributed.topology import Topology


@functools.cache
def root() -> Path:
    """A folder with the inputs of `dense_inputs.write_dense`: all models and data. It goes with the process."""
    folder = tempfile.TemporaryDirectory(prefix="fake-cuda-")
    atexit.register(folder.cleanup)
    write_dense(Path(folder.name))
    return Path(folder.name)


def on_device() -> tuple[Runtime, Topology]:
    """A world of this process, on the current device."""
    runtime, topology = alone()
    return replace(runtime, device=torch.device("cuda", torch.cuda.current_device())), topology


def run_on_device(config: Config) -> Result:
    """A whole run on the device; nobody may have been left out of it."""
    result = finish(*build(config, *on_device()))
    assert [event for event in result.events if event.get("status") not in (None, "ok")] == []
    return result
