"""Progress: what a long preparation of data tells the person who waits, a line every few seconds.

Like stop points (`distributed.stop_points`), the lines go to whoever listens. Nobody does in a test or in a tool that prepares
data on its own, and a preparation that takes less than `EVERY_S` says nothing at all: most starts do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")
EVERY_S = 5.0
"""Seconds between two lines, and before the first."""
_LOOK = 256
"""Items between two looks at the clock."""


class _Pace:
    """When the last line was written, over all steps of one preparation."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self.note, self.last = note, time.monotonic()

    def due(self) -> bool:
        return time.monotonic() - self.last >= EVERY_S

    def say(self, line: str) -> None:
        self.last = time.monotonic()
        self.note(f"data: {line}")


_pace: ContextVar[_Pace | None] = ContextVar("pace", default=None)


@contextmanager
def told_to(note: Callable[[str], None] | None) -> Iterator[None]:
    """Let `note` take the lines of all steps in the body; None: nobody listens."""
    token = _pace.set(None if note is None else _Pace(note))
    try:
        yield
    finally:
        _pace.reset(token)


def counted(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Yield the items; now and then say how many of `total` have been dealt with, and how long the others will take."""
    pace, began = _pace.get(), time.monotonic()
    if pace is None:
        yield from items
        return
    for done, item in enumerate(items):
        if done % _LOOK == 0 and done and pace.due():
            left = (time.monotonic() - began) / done * (total - done)
            pace.say(f"{done:,} of {total:,} {what} ({done / total:.0%}, about {left:.0f} s left)")
        yield item


def step(what: str) -> None:
    """Say that a step begins, where the preparation has taken a while already."""
    pace = _pace.get()
    if pace is not None and pace.due():
        pace.say(what)
