"""Signs of work: whether what this process does for minutes without a stop point still computes, reads or writes.

A download and a library's conversion have no steps to count. What the system counts of the process tells as much: processor
time of its threads, and bytes that it has read and written. The thread that waits for the work and the watchdog's are left out:
they are busy whatever the work does.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import psutil  # type: ignore[import-untyped]

STANDSTILL_S = 120.0
"""Seconds without a sign after which work stands still: longer than a download waits between two attempts."""
_EVERY_S = 10.0
_LEAST_SHARE, _LEAST_BYTES = 0.01, 1 << 18
"""Of the time between two looks, of one core; and between two looks, which read some kB themselves."""
WATCHING = "watchdog"
"""Name of the watchdog's thread."""


Counts = tuple[float, int]
"""Processor seconds, and bytes read and written: what the system has counted so far."""


def process_counts() -> Counts | None:
    """Of this process, without its watchdog's and the calling thread's seconds; None where the system does not say."""
    idle = {thread.native_id for thread in threading.enumerate() if thread.name == WATCHING}
    idle.add(threading.get_native_id())
    try:
        process = psutil.Process()
        seconds = sum(one.user_time + one.system_time for one in process.threads() if one.id not in idle)
        moved = process.io_counters()
        return seconds, moved.read_chars + moved.write_chars
    except (psutil.Error, AttributeError, OSError):
        return None


class SignsOfWork:
    """Of this process from now on, to be asked now and then by the thread that waits.

    Args:
        counts: what is looked at.
        clock: seconds.
    """

    def __init__(
        self, counts: Callable[[], Counts | None] = process_counts, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._counts, self._clock = counts, clock
        self._looked = self._last = clock()
        self._before = counts()

    def fresh(self) -> bool:
        """Whether there was a sign within the last `STANDSTILL_S`; always where the system counts nothing."""
        now = self._clock()
        if now - self._looked >= min(_EVERY_S, STANDSTILL_S / 4):
            counts = self._counts()
            if self._before is None or counts is None or self._moved(self._before, counts, now - self._looked):
                self._last = now
            self._before, self._looked = counts, now
        return now - self._last <= STANDSTILL_S

    def _moved(self, before: Counts, after: Counts, elapsed: float) -> bool:
        seconds, size = after[0] - before[0], after[1] - before[1]
        return seconds >= _LEAST_SHARE * elapsed or size >= _LEAST_BYTES
