"""Worker: one system of a wave, or its floor, in a process of its own, see `bench.harness.worker`.

A system is imported when it is opened and no other is: the peak of memory is its own.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedmoe_ds.bench.harness.system import BITWISE, FLOOR, OURS, PEER_PREFIX, System
from fedmoe_ds.bench.harness.workload import Workload
from fedmoe_ds.machine import device_peak_mib, peak_mib


class WaveWorker:
    """Trains the waves of one system."""

    def open(self, system: str, folder: str, workload: dict[str, Any]) -> None:
        load = Workload.from_json(workload)
        self.system, self.device = open_system(system, Path(folder), load), load.device

    def train(self, stage: str) -> dict[str, Any]:
        return asdict(self.system.train(stage))

    def peak(self) -> float:
        return device_peak_mib() if self.device == "cuda" else peak_mib()


class FloorWorker:
    """Measures the products of a wave whose routing it is told."""

    def open(self, workload: dict[str, Any], rows: list[list[list[int]]]) -> None:
        import numpy as np

        from fedmoe_ds.bench.wave.floor import DeviceFloor, Floor

        load = Workload.from_json(workload)
        self.floor = (DeviceFloor if load.device == "cuda" else Floor)(load, np.array(rows))

    def measure(self) -> dict[str, Any]:
        return asdict(self.floor.measure())


def make_worker(name: str) -> WaveWorker | FloorWorker:
    return FloorWorker() if name == FLOOR else WaveWorker()


def open_system(name: str, folder: Path, workload: Workload) -> System:
    """Import and load one system, and nothing of the others."""
    if name in (OURS, BITWISE):
        from fedmoe_ds.bench.wave.fused import Fused

        return Fused(folder, workload, bitwise=name == BITWISE)
    from fedmoe_ds.bench.wave.peft import Peft

    return Peft(folder, workload, name.removeprefix(PEER_PREFIX))
