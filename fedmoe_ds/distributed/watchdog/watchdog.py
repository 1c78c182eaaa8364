"""Watchdog: the thread with which one rank watches the others, and the only way in which it ends a job."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from fedmoe_ds import terminal
from fedmoe_ds.distributed import mpi
from fedmoe_ds.distributed.signs_of_work import WATCHING
from fedmoe_ds.distributed.watchdog.rank_health import Limits, Peer, Process

SPREAD_S = 0.3
"""Between telling the others that the job is over and leaving: time for the bytes to get out."""


class Watchdog:
    """The watchdog of one rank: a thread. A process calls `announce_exit` before it ends.

    Attributes:
        notes: lines about its start, for the user.
        device: of this rank; its thread asks it what it waits in.
    """

    def __init__(self, me: Peer, limits: Limits, notes: Sequence[str] = ()) -> None:
        self.me, self.limits, self.notes = me, limits, tuple(notes)
        self.device = torch.device("cpu")
        self.over = threading.Event()  # the job has been declared over
        self._left = threading.Event()
        self._leaving: dict[str, Any] | None = None  # what this process has said last
        self.thread = threading.Thread(target=self._watch, name=WATCHING, daemon=True)

    def _watch(self) -> None:
        try:
            if self.device.type == "cuda":
                # A new thread is on GPU 0, and its first question would make a context there, of half a GiB for every rank.
                torch.cuda.set_device(self.device)
            while not self._left.is_set():
                self.step()
        except Exception as error:
            if self._left.is_set():  # the process is on its way out, and what this thread uses is being taken down
                return
            say(traceback.format_exc())
            self.fail(f"the watchdog of {self.me.name} failed: {type(error).__name__}: {error}; its traceback is above")

    def step(self) -> None:
        """One beat: hear, judge, tell."""
        raise NotImplementedError

    def fail(self, text: str) -> NoReturn:
        """This watchdog has a defect. Without it the job could hang, so it ends, and nobody else is blamed."""
        raise NotImplementedError

    def announce_exit(self, code: int, text: str) -> None:
        """Tell the others that this process ends with `code`."""
        raise NotImplementedError

    def stop(self) -> None:
        """Stop watching; what the others do no longer matters."""
        self._left.set()

    def end(self, text: str, code: int, speaks: bool, kill: Sequence[Process] = ()) -> NoReturn:
        """The job is over: one line, and out. Called on the watchdog's own thread; the main thread may be stuck."""
        if self._left.is_set():
            sys.exit()  # of this thread only: the process ends already, with a code of its own
        mpi.leave_alone()  # before any rank ends: the first one to go closes its connections to all others
        if speaks:
            say(f"error: {' '.join(text.split())}")  # parts of it come from other hosts
        self.over.set()
        time.sleep(SPREAD_S)
        for process in kill:
            process.kill_here()
        os._exit(code)


def say(block: str) -> None:
    """Write lines to standard error, if anybody is still there to read them."""
    with contextlib.suppress(OSError, ValueError):
        terminal.show(block.rstrip("\n"), sys.stderr)
        sys.stderr.flush()
