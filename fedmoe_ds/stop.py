"""Stop requests: SIGTERM and SIGUSR1 ask the run to end after the current wave, with a checkpoint."""

from __future__ import annotations

import signal
from types import FrameType


class StopRequest:
    """Set by a signal, read between waves. A signal may arrive any number of times."""

    def __init__(self) -> None:
        self.name: str | None = None

    def install(self) -> StopRequest:
        """Start listening."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name

    @property
    def requested(self) -> bool:
        return self.name is not None
