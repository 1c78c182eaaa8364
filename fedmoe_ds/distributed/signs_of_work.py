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
from collections.abc import Iterable, Iterator
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


_Counts = tuple[float, int, frozenset[tuple[str, int, int]]]


class SignsOfWork:
    """Of this process from now on, to be asked now and then by the thread that waits.

    Args:
        watched: folders that the work fills, here or in another process; they need not exist.
    """

    def __init__(self, watched: Iterable[Path] = ()) -> None:
        self._process, self._watched = psutil.Process(), list(watched)
        self._looked = self._last = time.monotonic()
        self._before = self._counts()

    def fresh(self) -> bool:
        """Whether there was a sign within the last `STANDSTILL_S`; always where the system counts nothing."""
        now = time.monotonic()
        if now - self._looked >= min(_EVERY_S, STANDSTILL_S / 4):
            counts = self._counts()
            if self._before is None or counts is None or self._moved(counts, now - self._looked):
                self._last = now
            self._before, self._looked = counts, now
        return now - self._last <= STANDSTILL_S

    def _moved(self, counts: _Counts, elapsed: float) -> bool:
        assert self._before is not None
        seconds, size = counts[0] - self._before[0], counts[1] - self._before[1]
        return seconds >= _LEAST_SHARE * elapsed or size >= _LEAST_BYTES or counts[2] != self._before[2]

    def _counts(self) -> _Counts | None:
        """Processor seconds of the other threads, bytes read and written, and the state of the watched folders; None where the
        system does not say."""
        idle = {thread.native_id for thread in threading.enumerate() if thread.name == WATCHING}
        idle.add(threading.get_native_id())
        try:
            seconds = sum(one.user_time + one.system_time for one in self._process.threads() if one.id not in idle)
            moved = self._process.io_counters()
            return seconds, moved.read_chars + moved.write_chars, frozenset(_states(self._watched))
        except (psutil.Error, AttributeError, OSError):
            return None


def _states(folders: Iterable[Path]) -> Iterator[tuple[str, int, int]]:
    """Path, size and time of the last change of all files in these folders."""
    for folder in folders:
        for place, _, names in os.walk(folder):
            # Who waits for a lock opens its file again and again, which changes its time.
            for path in (os.path.join(place, name) for name in names if not name.endswith(".lock")):
                with suppress(OSError):  # just gone: renamed, by whoever works
                    found = os.lstat(path)
                    yield path, found.st_size, found.st_mtime_ns
