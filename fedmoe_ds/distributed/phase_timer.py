"""Phase timer: where wall time goes, by phase."""

from __future__ import annotations

import time


class PhaseTimer:
    """Seconds per phase, booked lap by lap."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self._last = time.monotonic()

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
