"""Layer worker: one stack of expert layers in a process of its own, see `bench.harness.worker`."""

from __future__ import annotations

import datetime
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fedmoe_ds.bench.baselines.deepspeed_layer import DeepSpeedStack
from fedmoe_ds.bench.baselines.layer_stack import OurStack
from fedmoe_ds.bench.harness.system import OURS, Clock
from fedmoe_ds.bench.harness.workload import Workload
from fedmoe_ds.distributed import process_groups
from fedmoe_ds.distributed.launcher import free_port
from fedmoe_ds.foundation.loading import load_model
from fedmoe_ds.machine import peak_mib


class LayerWorker:
    """Runs one stack."""

    def open(self, system: str, folder: str, workload: dict[str, Any]) -> None:
        self.stack = open_stack(system, Path(folder), Workload.from_json(workload))

    def run(self) -> dict[str, float]:
        clock = Clock()
        self.stack.run()
        return {**asdict(clock.stop()), "padding": self.stack.padding}

    def save(self, file: str) -> None:
        found = {"y": self.stack.run(), "factors": self.stack.factors_CT(), **self.stack.gradients()}
        save_file({name: value.contiguous() for name, value in found.items()}, file)

    def peak(self) -> float:
        return peak_mib()


def make_worker(name: str) -> LayerWorker:
    return LayerWorker()


def open_stack(system: str, folder: Path, workload: Workload) -> OurStack | DeepSpeedStack:
    """Load one stack. DeepSpeed's layer wants a world, if only of one."""
    if system == OURS:
        return OurStack(*load_model(folder, torch.float32, 1, 0, torch.device("cpu")), workload)
    if not process_groups.has_world():
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
        process_groups.join_world(datetime.timedelta(minutes=5), torch.device("cpu"))
    process_groups.create_groups(1)
    _, hosted = load_model(folder, torch.float32, 1, 0, torch.device("cpu"))
    return DeepSpeedStack(hosted, workload)
