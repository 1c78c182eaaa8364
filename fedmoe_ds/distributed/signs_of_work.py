"""Signs of work: whether what this process does for minutes without a stop point still computes, reads or writes.

A download and a library's conversion have no steps to count. What the system counts of the process tells as much: processor
time of its threads, and bytes that it has read and written. The thread that waits for the work and the watchdog's are left out:
they are busy whatever the work does. Linux does not count what comes through `recv`, but a download is written to a file.

Of several processes that want the same download one does it, and the others wait for its lock (the hub's libraries), without
any sign of their own. What the work is to fill is watched for that: as long as anybody's files there change, it goes on.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]

STANDSTILL_S = 120.0
"""Seconds without a sign after which work stands still: longer than a download waits between two attempts."""
_EVERY_S = 10.0
_LEAST_SHARE, _LEAST_BYTES = 0.01, 1 << 18
"""Of the time between two looks, of one core; and between two looks, which read some kB themselves."""
WATCHING = "watchdog"
"""Name of the watchdog's thread."""


File = tuple[str, int, int]
"""Path, size and time of the last change."""
Counts = tuple[float, int, frozenset[File]]
"""Processor seconds, bytes read and written, which the system has counted so far, and the files of watched folders."""


def process_counts(watched: Iterable[Path] = ()) -> Counts | None:
    """Of this process, without its watchdog's and the calling thread's seconds; None where the system does not say.

    Args:
        watched: folders that the work fills, here or in another process; they need not exist.
    """
    idle = {thread.native_id for thread in threading.enumerate() if thread.name == WATCHING}
    idle.add(threading.get_native_id())
    try:
        process = psutil.Process()
        seconds = sum(one.user_time + one.system_time for one in process.threads() if one.id not in idle)
        moved = process.io_counters()
        return seconds, moved.read_chars + moved.write_chars, frozenset(_files(watched))
    except (psutil.Error, AttributeError, OSError):
        return None


def _files(folders: Iterable[Path]) -> Iterator[File]:
    for folder in folders:
        for place, _, names in os.walk(folder):
            # Who waits for a lock opens its file again and again, which changes its time.
            for path in (os.path.join(place, name) for name in names if not name.endswith(".lock")):
                with suppress(OSError):  # just gone: renamed, by whoever works
                    found = os.lstat(path)
                    yield path, found.st_size, found.st_mtime_ns


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
        return seconds >= _LEAST_SHARE * elapsed or size >= _LEAST_BYTES or after[2] != before[2]
