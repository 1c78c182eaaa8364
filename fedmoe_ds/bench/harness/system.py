"""System: one way to train a workload: how it is called, what it answers, and when two of them compute the same.

Flower's environment imports this file.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedmoe_ds.bench.harness.checks import check_known

OURS = "fedmoe_ds"
BITWISE = "fedmoe_ds bitwise"
HALF_MOMENTS = "fedmoe_ds bf16 moments"
PEER_PREFIX = "peft "
FLOOR = "floor"

MODES = {"fast": [OURS], "bitwise": [BITWISE], "both": [OURS, BITWISE]}
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
"""Of experts, in transformers."""
AGREEMENT = {"float32": 1e-4, "bfloat16": 3e-2}
"""How far losses of two systems may be apart, by the type of the frozen weights: bfloat16 has three digits, and systems round
in different places."""


class DisagreementError(Exception):
    """Two systems do not compute the same thing, so their speeds must not be compared."""


def system_names(mode: str, peers: Sequence[str]) -> list[str]:
    """The systems of a run, ours first. Raises UserError for an unknown mode or peer."""
    check_known("--mode", "mode", mode, MODES)
    check_known("--peers", "experts implementation", peers, IMPLEMENTATIONS)
    return [*MODES[mode], *(PEER_PREFIX + peer for peer in dict.fromkeys(peers))]


def check_agreement(losses: Mapping[str, Sequence[Sequence[float]]], tolerance: float = AGREEMENT["float32"]) -> None:
    """Every system's losses per client equal those of the first system. Raises DisagreementError.

    Of a wave they are the first and the last warm-up step's: the first compares the forward pass, the last gradients and
    optimizer as well. Differences are relative above 1: AdamW's first step turns rounding noise in tiny gradients into steps of
    full size.
    """
    reference = next(iter(losses))
    for name, found in losses.items():
        for client, (ours, theirs) in enumerate(zip(losses[reference], found, strict=True)):
            gaps = [abs(a - b) / max(1.0, abs(a)) for a, b in zip(ours, theirs, strict=True)]
            if not all(gap <= tolerance for gap in gaps):  # nan fails as well
                raise DisagreementError(
                    f"client {client}: {reference} has the losses {ours}, {name} has {theirs}; "
                    f"they differ by more than {tolerance:.0e}: not the same computation"
                )


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
