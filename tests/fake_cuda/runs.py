"""Runs: small federations on the stand-in's device, for cases."""

from __future__ import annotations

import atexit
import functools
import os
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
    """A folder with the inputs of `dense_inputs.write_dense`: all models and data. It goes with the process.

    Several ranks share it ($FAKE_FOLDER), and rank 0 writes it.
    """
    given = os.environ.get("FAKE_FOLDER")
    if given is None:
        folder = tempfile.TemporaryDirectory(prefix="fake-cuda-")
        atexit.register(folder.cleanup)
        given = folder.name
    if os.environ.get("RANK", "0") == "0":
        write_dense(Path(given))
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
