"""System: one way to train a workload, as the wave benchmark sees it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

OURS = "fedmoe_ds"
BITWISE = "fedmoe_ds bitwise"
HALF_MOMENTS = "fedmoe_ds bf16 moments"
PEER_PREFIX = "peft "
FLOOR = "floor"


@dataclass(frozen=True)
class Timing:
    """A stretch of work: wall seconds, and the CPU seconds that the machine gave to it (fewer on a busy machine)."""

    wall: float
    cpu: float

    def times(self, factor: float) -> Timing:
        return Timing(self.wall * factor, self.cpu * factor)


class Clock:
    """Started when made; `stop` returns the span. On a GPU both wait until the device has done what it was given."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self._wait()
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def _wait(self) -> None:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()

    def stop(self) -> Timing:
        self._wait()
        return Timing(time.perf_counter() - self._wall, time.process_time() - self._cpu)


@dataclass(frozen=True)
class Outcome:
    """One trained wave.

    Attributes:
        time: from the reset of the adapters to the last optimizer step.
        losses: per client, the loss of its first and of its last step.
        rows: routed rows per [client, layer, expert] over the wave; empty where the system does not count them.
    """

    time: Timing
    losses: list[tuple[float, float]]
    rows: list[list[list[int]]]


class System(Protocol):
    """Holds a loaded model; every `train` starts from the same adapters and a fresh optimizer."""

    def train(self, stage: str) -> Outcome:
        """Train the wave of a stage, `warm-up` or `timed`."""
        ...
