"""Phase timer: where wall time goes, by phase. What is between two phases is booked on none."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from fedmoe_ds.distributed.activity import activity


class PhaseTimer:
    """Seconds per phase, booked phase by phase or lap by lap."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self._last = time.monotonic()

    @contextmanager
    def phase(self, name: str, round_index: int | None = None) -> Iterator[None]:
        """The body belongs to a phase: its seconds are booked on it, and the watchdogs of other ranks can name it."""
        activity.enter(name, round_index)
        self.resume()
        yield
        self.lap(name)

    def lap(self, phase: str) -> None:
        """Book the time since the last lap on `phase`."""
        now = time.monotonic()
        self.phases[phase] = self.phases.get(phase, 0.0) + now - self._last
        self._last = now

    def resume(self) -> None:
        """Go on after a pause that belongs to no phase."""
        self._last = time.monotonic()

    def total(self) -> float:
        """Seconds of all phases."""
        return sum(self.phases.values())
