"""Device queue: which collective a GPU is in.

NCCL's collectives return as soon as they are queued, and the wait for a peer takes place on the device, while the host is
somewhere else. So two events frame each of them on its stream: the first has passed and the second has not as long as the
device is in the collective. The watchdog's thread asks them on its beat; the training loop waits for nothing.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Protocol

_LONGEST = 4096
"""Collectives that are remembered where nobody asks, in a process without a watchdog."""


class Event(Protocol):
    """A point in a device's stream, as `torch.cuda.Event`."""

    def query(self) -> bool:
        """Whether the device has passed it. Never waits."""


@dataclass(frozen=True)
class _Queued:
    name: str
    begun: Event
    done: Event


class DeviceQueue:
    """Filled by the main thread, asked by the watchdog's: the ends of a deque belong to one of them each."""

    def __init__(self) -> None:
        self._queued: deque[_Queued] = deque(maxlen=_LONGEST)
        self._inside: _Queued | None = None
        self._since = 0.0

    def add(self, name: str, begun: Event, done: Event) -> None:
        """A collective has been queued between these events."""
        self._queued.append(_Queued(name, begun, done))

    def waiting(self) -> tuple[str, float] | None:
        """The collective that the device is in, and since when (monotonic seconds); None while it computes or has no work.

        The time is that of the first question which found it there, at most a beat of the watchdog too late.
        """
        try:
            while self._queued:
                first = self._queued[0]
                if not first.done.query():
                    return self._found(first) if first.begun.query() else None
                self._queued.popleft()
        except (RuntimeError, IndexError):
            # A device with an error answers every question with it; the main thread meets it where it waits for the device.
            self._queued.clear()
        return None

    def _found(self, first: _Queued) -> tuple[str, float]:
        if self._inside is not first:
            self._inside, self._since = first, time.monotonic()
        return first.name, self._since
