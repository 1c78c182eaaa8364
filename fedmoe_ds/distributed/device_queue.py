"""Device queue: which collective a GPU is in, and how long it was in those that it has passed.

NCCL's collectives return as soon as they are queued, and the wait for a peer takes place on the device, while the host is
somewhere else. So two events frame each of them on its stream: the first has passed and the second has not as long as the
device is in the collective. The watchdog's thread asks them on its beat; the training loop waits for nothing. The time between
the two is that of the collective, waiting for peers included: the host's clock would show how long it takes to queue one.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

_LONGEST = 4096
"""Collectives that are remembered at once: a device that is further behind than that has lost track."""


class Event(Protocol):
    """A point in a device's stream, as `torch.cuda.Event`."""

    def query(self) -> bool:
        """Whether the device has passed it. Never waits."""

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds from here to a later event; both have been passed."""


@dataclass(frozen=True)
class _Queued:
    name: str
    begun: Event
    done: Event


class DeviceQueue:
    """Filled and emptied by the main thread, asked by the watchdog's."""

    def __init__(self) -> None:
        self._queued: deque[_Queued] = deque()
        self._inside: _Queued | None = None
        self._since = 0.0
        self._seconds: dict[str, float] = {}
        self._complete = True
        self._lock = threading.Lock()

    def add(self, name: str, begun: Event, done: Event) -> None:
        """A collective has been queued between these events; its kind is the first word of its name."""
        with self._lock:
            if len(self._queued) >= _LONGEST:
                self._pass()
            if len(self._queued) >= _LONGEST:
                self._queued.popleft()
                self._complete = False
            self._queued.append(_Queued(name, begun, done))

    def take(self) -> dict[str, float] | None:
        """Seconds that the device was in collectives of each kind, of those that it has passed since the last call.

        None where a time was lost: a sum without it would pass for a faster network.
        """
        with self._lock:
            self._pass()
            taken, complete = self._seconds, self._complete
            self._seconds, self._complete = {}, True
        return taken if complete else None

    def waiting(self) -> tuple[str, float] | None:
        """The collective that the device is in, and since when (monotonic seconds); None while it computes or has no work.

        The time is that of the first question which found it there, at most a beat of the watchdog too late.
        """
        with self._lock:
            try:
                first = self._pass()
                return self._found(first) if first is not None and first.begun.query() else None
            except RuntimeError:
                self._give_up()
        return None

    def _pass(self) -> _Queued | None:
        """Count the collectives that the device has passed; the first that it has not."""
        try:
            while self._queued:
                first = self._queued[0]
                if not first.done.query():
                    return first
                kind = first.name.partition(" ")[0]
                self._seconds[kind] = self._seconds.get(kind, 0.0) + first.begun.elapsed_time(first.done) / 1000
                self._queued.popleft()
        except RuntimeError:
            self._give_up()
        return None

    def _give_up(self) -> None:
        # A device with an error answers every question with it; the main thread meets it where it waits for the device.
        self._queued.clear()
        self._complete = False

    def _found(self, first: _Queued) -> tuple[str, float]:
        if self._inside is not first:
            self._inside, self._since = first, time.monotonic()
        return first.name, self._since
