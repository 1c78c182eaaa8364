"""Stop requests: SIGTERM, SIGUSR1 and SIGINT (Ctrl-C) ask the run to end after the current wave, with a checkpoint, or between
two steps of what comes before the first wave (`stop_points`).

Scripts import this module first and little with it: a signal is heard while the imports that take seconds go on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

from fedmoe_ds.distributed.activity import activity
from fedmoe_ds.distributed.launcher import known_rank
from fedmoe_ds.errors import EXIT_INTERRUPTED, EXIT_LOST, EXIT_STOPPED

MAX_REQUEUES = "FEDMOE_MAX_REQUEUES"
"""Of the environment: set by a batch script that requeues its job after a stop, and counts losses (`requeue_guard.py`)."""
_AFTER_WAVE = "after the wave that is running, with a checkpoint"
_AFTER_STEP = "after the step that is running; the same command continues"
_WHEN = {"start": _AFTER_STEP, "load": _AFTER_STEP}
"""Phase -> when a request is served; else after the wave."""


class StopRequest:
    """Set by a signal, read between waves and at stop points. A signal may arrive any number of times.

    Until `begun`, when all ranks have found each other, there is nothing to save: a signal then ends the process at once.
    Python runs no handler while the main thread waits in the rendezvous, so a thread reads what the interpreter notes.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._pipe: tuple[int, int] | None = None

    def install(self) -> StopRequest:
        """Start listening. What was started with SIGINT ignored (in the background of a script) goes on ignoring it."""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            if number != signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self.receive)
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)  # set_wakeup_fd refuses a descriptor that blocks
        signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        threading.Thread(target=self._leave_early, args=(self._pipe[0],), name="early stop", daemon=True).start()
        return self

    def begun(self) -> None:
        """From here on a signal is remembered, and served when there is something to save."""
        if self._pipe is not None:
            signal.set_wakeup_fd(-1)
            os.close(self._pipe[1])
            self._pipe = None

    def _leave_early(self, source: int) -> None:
        # Empty when `begun` has closed the other end: the loop does not run then.
        for number in os.read(source, 1):
            if number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                text = f"stopped by {signal.Signals(number).name} before anything was begun; start the same command again\n"
                os.write(2, text.encode() if known_rank() == 0 else b"")
                # There is no run folder yet in which this stop could count, and without a count requeues have no end.
                os._exit(EXIT_LOST if MAX_REQUEUES in os.environ else EXIT_STOPPED)
        os.close(source)

    def receive(self, number: int, frame: FrameType | None) -> None:
        """What a signal is answered with."""
        name = signal.Signals(number).name
        if self.name is None and number == signal.SIGINT and self._pipe is None and known_rank() == 0:
            # A handler may interrupt a print, and Python's buffered streams refuse to be entered twice: hence os.write.
            os.write(2, f"SIGINT: the run ends {_WHEN.get(activity.phase, _AFTER_WAVE)}\n".encode())
        self.name = name

    @property
    def requested(self) -> bool:
        return self.name is not None


def leave_on_interrupt() -> None:
    """Until `unwind_on_interrupt`, Ctrl-C ends this process at once with one line: nothing has been begun."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def unwind_on_interrupt() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt: what was begun is cleaned up."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(number: int, frame: Any) -> None:
    os.write(2, b"error: stopped by SIGINT\n")
    os._exit(EXIT_INTERRUPTED)


@contextlib.contextmanager
def unwinding_on_sigterm() -> Iterator[None]:
    """SIGTERM, with which schedulers end a job, leaves by way of `finally`: no draft stays."""
    main_thread = threading.current_thread() is threading.main_thread()
    if not main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _unwind(number: int, frame: object) -> NoReturn:
    # A handler may interrupt a print, and Python's buffered streams refuse to be entered twice.
    os.write(2, b"stopped by SIGTERM\n")
    raise SystemExit(128 + number)
