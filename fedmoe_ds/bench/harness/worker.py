"""Worker: one system in a process of its own, so that peak memory is its own and rounds can alternate between systems.

`python -m fedmoe_ds.bench.harness.worker` reads one JSON request per line and answers with one JSON line. Whatever
libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedmoe_ds.bench.fft_moe.workload import DENSE, POOL_PREFIX, PoolWorkload
from fedmoe_ds.bench.harness.system import BITWISE, FLOOR, OURS, PEER_PREFIX, System
from fedmoe_ds.bench.harness.workload import Workload
from fedmoe_ds.errors import UserError
from fedmoe_ds.machine import device_peak_mib, peak_mib

Request = dict[str, Any]


class WaveWorker:
    """Answers `open`, `train` and `peak` for one system."""

    def __init__(self) -> None:
        self.system: System | None = None
        self.device = "cpu"

    def answer(self, request: Request) -> Any:
        if request["do"] == "open":
            workload = Workload.from_json(request["workload"])
            self.system = open_system(request["system"], Path(request["folder"]), workload)
            self.device = workload.device
            return None
        if request["do"] == "peak":
            return device_peak_mib() if self.device == "cuda" else peak_mib()
        assert request["do"] == "train" and self.system is not None, request
        return asdict(self.system.train(request["stage"]))


class FloorWorker:
    """Answers `open`, which brings the row counts, then `measure`."""

    def __init__(self) -> None:
        self.floor: Any = None

    def answer(self, request: Request) -> Any:
        if request["do"] == "open":
            import numpy as np

            from fedmoe_ds.bench.wave.floor import DeviceFloor, Floor

            workload = Workload.from_json(request["workload"])
            self.floor = (DeviceFloor if workload.device == "cuda" else Floor)(workload, np.array(request["rows"]))
            return None
        assert request["do"] == "measure", request
        return asdict(self.floor.measure())


class PoolWorker:
    """Answers `open`, `measure` and `peak` for the dense foundation or for one pool size."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.system: Any = None

    def answer(self, request: Request) -> Any:
        if request["do"] == "open":
            from fedmoe_ds.bench.fft_moe.systems import Dense, ExpertPool

            folder, workload = Path(request["folder"]), PoolWorkload(**request["workload"])
            pool = self.name.removeprefix(POOL_PREFIX)
            self.system = Dense(folder, workload) if self.name == DENSE else ExpertPool(folder, workload, int(pool))
            return None
        if request["do"] == "peak":
            return peak_mib()
        assert request["do"] == "measure", request
        return self.system.measure()


def open_system(name: str, folder: Path, workload: Workload) -> System:
    """Import and load one system, and nothing of the others."""
    if name in (OURS, BITWISE):
        from fedmoe_ds.bench.wave.fused import Fused

        return Fused(folder, workload, bitwise=name == BITWISE)
    from fedmoe_ds.bench.wave.peft import Peft

    return Peft(folder, workload, name.removeprefix(PEER_PREFIX))


def answer_load(request: Request) -> Any:
    """Load one rank's part of a model and measure it."""
    from fedmoe_ds.bench.memory.loader import measure

    return measure(Path(request["folder"]), request["ep_size"])


def role(name: str) -> Callable[[Request], Any]:
    if name == "load":
        return answer_load
    if name == DENSE or name.startswith(POOL_PREFIX):
        return PoolWorker(name).answer
    return FloorWorker().answer if name == FLOOR else WaveWorker().answer


def serve(answer: Callable[[Request], Any], requests: Iterator[str], write: Callable[[str], Any]) -> None:
    """Answer until the requests end; a user's mistake is an answer too, anything else ends the process."""
    for line in requests:
        try:
            reply: Request = {"result": answer(json.loads(line))}
        except UserError as error:
            reply = {"user_error": str(error)}
        write(json.dumps(reply) + "\n")


def main() -> None:
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(1)
    serve(role(sys.argv[1]), iter(sys.stdin), channel.write)
    channel.flush()
    os._exit(0)  # no atexit handler may wait for peers


if __name__ == "__main__":
    main()
