"""Activity: what this process is doing, in words for its peers: round, phase, and the collective that it waits in.

Collectives are timed by name, too, so that a round can say where its seconds went. On CUDA a collective returns as soon as it
is queued: how long it takes, and what the device waits in, is asked of the device (`device_queue`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fedmoe_ds.distributed.device_queue import DeviceQueue


@dataclass
class Tally:
    """Calls of one collective: how many, seconds spent inside, bytes handed over by this rank; `queued`: a device times it."""

    calls: int = 0
    seconds: float = 0.0
    bytes: int = 0
    queued: bool = False


@dataclass
class Activity:
    """Written by the main thread, read by the watchdog's thread.

    Attributes:
        round: the round that runs; 0 before the first.
        phase: start, load, train, aggregate, evaluate, checkpoint ...
        waiting: the collective that the process is in, or None.
        since: when `waiting` last changed (monotonic seconds).
        failed: the collective that an exception came out of, or None.
        groups: names of the groups of ranks that this one is in, beside the world.
        tallies: by name of the collective, since the last `take`.
        queue: collectives that the device has been given.
    """

    round: int = 0
    phase: str = "start"
    waiting: str | None = None
    since: float = field(default_factory=time.monotonic)
    failed: str | None = None
    groups: list[str] = field(default_factory=list)
    tallies: dict[str, Tally] = field(default_factory=dict)
    queue: DeviceQueue = field(default_factory=DeviceQueue)

    def restart(self) -> None:
        """Another run begins in this process: nothing of the one before is true of it."""
        self.round, self.waiting, self.failed = 0, None, None
        self.groups, self.tallies, self.queue = [], {}, DeviceQueue()
        self.enter("start")

    def enter(self, phase: str, round_index: int | None = None) -> None:
        """A new phase of the run begins."""
        self.phase, self.since = phase, time.monotonic()
        self.round = self.round if round_index is None else round_index

    @contextmanager
    def collective(self, name: str, where: str, size: int = 0, calls: int = 1, queued: bool = False) -> Iterator[None]:
        """The body is one collective over `where`; of nested ones the outermost is named. `size` is in bytes; `calls` is 0
        where the body only waits for one that was counted when it was started; `queued`: on a device, which times it."""
        if self.waiting is not None:
            yield
            return
        # `since` comes before `waiting`: the watchdog's thread reads both without a lock, and must never see this
        # collective with an older time, which would look like a long wait.
        began = self.since = time.monotonic()
        self.failed = None
        self.waiting = f"{name} over {where}"
        try:
            yield
        except BaseException:
            # `run_entry` reads it: an exception out of a collective usually means that a peer is gone.
            self.failed = self.waiting
            raise
        finally:
            self.since = time.monotonic()
            self.waiting = None
        # Only a collective that came to its end is counted; `since` is now the moment of that end.
        tally = self.tallies.setdefault(name, Tally())
        tally.calls, tally.bytes, tally.queued = tally.calls + calls, tally.bytes + size, tally.queued or queued
        # Of a queued one the host knows how long queueing took, and nothing of the collective.
        tally.seconds += 0.0 if queued else self.since - began

    def take(self) -> dict[str, dict[str, Any]]:
        """The tallies so far, as JSON; counting starts again. `seconds` is None where a device has lost track of its own."""
        (taken, self.tallies), on_device = (self.tallies, {}), self.queue.take()

        def seconds(name: str, tally: Tally) -> float | None:
            if not tally.queued:
                return tally.seconds
            return None if on_device is None else tally.seconds + on_device.get(name, 0.0)

        return {name: {"calls": t.calls, "seconds": seconds(name, t), "bytes": t.bytes} for name, t in sorted(taken.items())}

    def state(self) -> dict[str, Any]:
        """What a heartbeat says. Durations, not times of day: hosts' clocks may disagree."""
        waiting, since = self.waiting, self.since
        if waiting is None and (inside := self.queue.waiting()) is not None:
            waiting, since = inside
        return {
            "round": self.round,
            "phase": self.phase,
            "waiting": waiting,
            "for_s": time.monotonic() - since,
            "groups": self.groups,
        }


activity = Activity()
"""Of this process."""
