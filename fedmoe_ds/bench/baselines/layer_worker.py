"""Layer worker: one stack of expert layers in a process of its own: `python -m fedmoe_ds.bench.baselines.layer_worker`."""

from __future__ import annotations

import datetime
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fedmoe_ds.bench.baselines.deepspeed_layer import DeepSpeedStack
from fedmoe_ds.bench.baselines.layer_stack import OurStack
from fedmoe_ds.bench.harness.program import Request, take_channel
from fedmoe_ds.bench.harness.system import OURS, Clock
from fedmoe_ds.bench.harness.worker import serve
from fedmoe_ds.bench.harness.workload import Workload
from fedmoe_ds.distributed import process_groups
from fedmoe_ds.distributed.launcher import free_port
from fedmoe_ds.foundation.loading import load_model
from fedmoe_ds.machine import peak_mib


class LayerWorker:
    """Answers `open`, `run`, `save` and `peak` for one stack."""

    def __init__(self) -> None:
        self.stack: OurStack | DeepSpeedStack | None = None

    def answer(self, request: Request) -> Any:
        if request["do"] == "open":
            workload = Workload.from_json(request["workload"])
            self.stack = open_stack(request["system"], Path(request["folder"]), workload)
            return None
        assert self.stack is not None, request
        if request["do"] == "peak":
            return peak_mib()
        if request["do"] == "run":
            clock = Clock()
            self.stack.run()
            return {**asdict(clock.stop()), "padding": self.stack.padding}
        assert request["do"] == "save", request
        found = {"y": self.stack.run(), "factors": self.stack.factors_CT(), **self.stack.gradients()}
        save_file({name: value.contiguous() for name, value in found.items()}, request["file"])
        return None


def open_stack(system: str, folder: Path, workload: Workload) -> OurStack | DeepSpeedStack:
    """Load one stack. DeepSpeed's layer wants a world, if only of one."""
    if system == OURS:
        return OurStack(*load_model(folder, torch.float32, 1, 0, torch.device("cpu")), workload)
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    process_groups.join_world("gloo", datetime.timedelta(minutes=5))
    process_groups.create_groups(1)
    _, hosted = load_model(folder, torch.float32, 1, 0, torch.device("cpu"))
    return DeepSpeedStack(hosted, workload)


def main() -> None:
    channel = take_channel()
    torch.set_num_threads(1)
    serve(LayerWorker().answer, iter(sys.stdin), channel.write)
    channel.flush()
    os._exit(0)  # no atexit handler may wait for peers


if __name__ == "__main__":
    main()
