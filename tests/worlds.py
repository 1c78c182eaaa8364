"""Worlds of threads for tests of the watchdog: every thread is a rank, sockets are real, and nobody's process ends."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from fedmoe_ds.distributed.watchdog import start
from fedmoe_ds.distributed.watchdog.rank_health import Limits, Process
from fedmoe_ds.distributed.watchdog.watchdog import Watchdog

LIMITS = Limits(silence=20.0, waiting=1800.0, ranks=3)
LONG_S = 60.0
"""For what ends by an event: only a test that fails waits so long, and a busy machine is no failure."""


@dataclass
class Ending:
    """A watchdog has ended the job."""

    rank: int
    text: str
    code: int
    kill: list[Process]


class EndError(SystemExit):
    """Ends a thread as `os._exit` ends a process."""


@dataclass
class Endings:
    """What has ended, in order."""

    all: list[Ending] = field(default_factory=list)

    def wait(self, count: int = 1, limit_s: float = LONG_S) -> list[Ending]:
        until(lambda: len(self.all) >= count, limit_s)
        return self.all


@pytest.fixture(autouse=True)
def endings(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endings]:
    """Instead of ending this process, watchdogs end their thread and are noted: in every test that may start one.

    None outlives its test: left alone it would miss its ranks some seconds later, and end the process of other tests.
    """
    found, made, init = Endings(), list[Watchdog](), Watchdog.__init__

    def note(watch: Watchdog, *args: Any, **options: Any) -> None:
        init(watch, *args, **options)
        made.append(watch)

    def end(watch: Watchdog, text: str, code: int, speaks: bool = True, kill: Any = ()) -> None:
        found.all.append(Ending(watch.me.rank, text, code, list(kill)))
        raise EndError

    monkeypatch.setattr(threading, "excepthook", lambda args, real=threading.excepthook: _report(args, real))
    monkeypatch.setattr(Watchdog, "__init__", note)
    monkeypatch.setattr(Watchdog, "end", end)
    monkeypatch.setattr(start, "_watch", None)
    yield found
    for watch in made:
        watch.stop()  # from here on it ends nothing but its thread


def _report(args: threading.ExceptHookArgs, real: Callable[[threading.ExceptHookArgs], Any]) -> None:
    if not issubclass(args.exc_type, EndError):
        real(args)


class Meeting:
    """The control plane of a world of threads."""

    def __init__(self, size: int) -> None:
        self.size, self.told = size, list[list[bytes]]()
        self._barrier, self._slots = threading.Barrier(size, timeout=LONG_S), [b""] * size

    def rank(self, rank: int) -> Any:
        meeting = self

        class Control:
            name, size = "the world", meeting.size

            def gather(self, payload: bytes) -> list[bytes]:
                meeting._slots[rank] = payload
                meeting._barrier.wait()
                result = list(meeting._slots)
                if rank == 0:
                    meeting.told.append(result)
                meeting._barrier.wait()
                return result

        Control.rank = rank  # type: ignore[attr-defined]
        return Control()


class World:
    """The watchdogs of a world: all ranks but the last, which comes when it is told to."""

    def __init__(self, size: int) -> None:
        self.watches: dict[int, Any] = {}
        self.failures: dict[int, Exception] = {}
        self.port = 0
        self.late = threading.Event()
        self._meeting, self._size = Meeting(size), size
        self._threads = [threading.Thread(target=self._start, args=(rank,), daemon=True) for rank in range(size)]

    def _start(self, rank: int) -> None:
        try:
            self.watches[rank] = start.start_watchdog(self._meeting.rank(rank), LIMITS, rank, torch.device("cpu"))
        except Exception as error:
            self.failures[rank] = error

    def begin(self) -> None:
        for thread in self._threads:
            thread.start()
        until(lambda: len(self.watches) == self._size - 1)
        self.port = next(told["places"][0][1] for told in self.told() if "places" in told)

    def told(self) -> list[dict[str, Any]]:
        """What rank 0 has said over the control plane."""
        return [json.loads(gathered[0]) for gathered in self._meeting.told]

    def complete(self) -> None:
        """The last rank comes."""
        self.late.set()
        until(lambda: len(self.watches) + len(self.failures) == self._size)
        assert not self.failures

    def hear_each_other(self) -> None:
        """Every rank hears from rank 0 once more, and rank 0 from every rank."""
        now = time.monotonic()
        ranks = range(1, self._size)
        until(lambda: all(self.watches[rank].main.heard > now for rank in ranks))
        until(lambda: all(self.watches[0].peers[rank].heard > now for rank in ranks))

    def stop(self) -> None:
        for thread in self._threads:  # who comes only now is stopped, too
            thread.join(LONG_S)
        for watch in self.watches.values():
            watch.stop()
        for watch in self.watches.values():
            watch.thread.join(LONG_S)


@contextmanager
def world(size: int, monkeypatch: pytest.MonkeyPatch, master: str = "127.0.0.1") -> Iterator[World]:
    """All ranks but the last are in; the last one has everything but a connection."""
    made, real = World(size), socket.create_connection

    def create(*args: Any, **options: Any) -> socket.socket:
        if threading.current_thread() is made._threads[-1]:
            made.late.wait(LONG_S)
        return real(*args, **options)

    monkeypatch.setattr(socket, "create_connection", create)
    monkeypatch.setenv("MASTER_ADDR", master)
    try:
        made.begin()
        yield made
    finally:
        made.late.set()
        made.stop()


def until(condition: Callable[[], Any], limit_s: float = LONG_S) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.005)
