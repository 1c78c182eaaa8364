"""Supervisor: the ranks of one machine, started again when one of them is lost.

`torchrun --max-restarts` restarts after every failure, a mistake in the configuration included, and gives ranks no time for a
checkpoint on SIGUSR1. This one restarts only what that can mend: a rank that was killed, or a job that ended with EXIT_LOST.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

from fedmoe_ds.distributed.launcher import free_port
from fedmoe_ds.errors import EXIT_LOST, EXIT_STOPPED, EXIT_USER_ERROR

_POLL_S = 0.1
_GRACE_S = 15.0
"""How long the other ranks have to end by themselves once a rank has ended in failure and the limit on silence is over."""
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


class Supervisor:
    """Starts `command` once per rank, and again after a loss.

    Args:
        command: the program and its arguments, without resuming.
        ranks: processes to start.
        max_restarts: starts after the first one, at most. Unless it is 0, those do not count before which a loss has taught the
            job something.
        silence_s: the job's own limit on silence.
        note: takes a line for the user.
        variables: of the environment, beside this process's own.
        learnt: what the job has written down for its next start (passes that have to be smaller); there is an end to that.
    """

    def __init__(
        self,
        command: list[str],
        ranks: int,
        max_restarts: int,
        silence_s: float,
        note: Callable[[str], None],
        variables: Mapping[str, str] | None = None,
        learnt: Callable[[], frozenset[object]] = frozenset,
    ) -> None:
        self.command, self.ranks, self.max_restarts, self.note = command, ranks, max_restarts, note
        self.patience_s, self.variables, self.learnt = silence_s + _GRACE_S, variables or {}, learnt
        self._processes: list[subprocess.Popen[bytes]] = []
        self._asked: signal.Signals | None = None
        self._sent: signal.Signals | None = None

    @property
    def asked(self) -> str | None:
        """The name of the signal that was heard, and passed on."""
        return None if self._asked is None else self._asked.name

    def run(self) -> int:
        """Run to the end, to a stop request, or to the last restart; returns the exit code."""
        with self._listening():
            resume, restarts, known = list[str](), 0, self.learnt()
            while restarts <= self.max_restarts:
                code = self._start(resume)
                if code != EXIT_LOST or self._asked is not None:
                    return code
                resume, before, known = ["--resume", "auto"], known, self.learnt()
                if known - before and self.max_restarts:
                    self.note("restart from the last checkpoint, with smaller passes: memory ran out")
                    continue
                restarts += 1
                if restarts <= self.max_restarts:
                    self.note(f"restart {restarts} of {self.max_restarts}, from the last checkpoint")
        self.note(
            f"--max-restarts: {self.max_restarts}: the job was lost once more; the last checkpoint is intact, start it again"
        )
        return EXIT_LOST

    def _start(self, resume: list[str]) -> int:
        port = str(free_port())
        try:
            for rank in range(self.ranks):
                self._processes.append(self._rank(rank, port, resume))
            if self._asked is not None:  # while they were being started: some may not have heard it
                self._pass_on(self._asked)
            return self._wait()
        finally:
            for process in self._processes:
                process.kill()
                process.wait()
            self._processes = []

    def _rank(self, rank: int, port: str, resume: list[str]) -> subprocess.Popen[bytes]:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.ranks, "LOCAL_SIZE": self.ranks}
        variables = {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        # A session of its own: Ctrl-C at the terminal reaches the supervisor alone, which passes it on once.
        return subprocess.Popen(
            [*self.command, *resume], env={**os.environ, **self.variables, **variables}, start_new_session=True
        )

    def _wait(self) -> int:
        deadline = None
        while any(process.poll() is None for process in self._processes):
            # The others usually end by themselves, with a better reason than a kill: they get the watchdog's time for it.
            failed = any(process.poll() not in (None, 0, EXIT_STOPPED, self._deaf) for process in self._processes)
            if failed and deadline is None:
                deadline = time.monotonic() + self.patience_s
            if deadline is not None and time.monotonic() > deadline:
                break
            time.sleep(_POLL_S)
        codes = [process.poll() for process in self._processes]
        unheard = [code is not None and code == self._deaf for code in codes]
        if any(unheard):
            self.note(f"stopped by {self.asked} before the ranks had begun; start the same command again")
        return verdict([EXIT_STOPPED if deaf else code for code, deaf in zip(codes, unheard, strict=True)])

    @property
    def _deaf(self) -> int | None:
        """The exit code of a rank that did not hear yet: what was passed on has ended it. None where nothing was."""
        return None if self._sent is None else -self._sent

    @contextmanager
    def _listening(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # Python hears signals in its main thread alone, which is somebody else's here
            return
        before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._asked = signal.Signals(number)
        self._pass_on(self._asked)

    def _pass_on(self, number: signal.Signals) -> None:
        # Ranks have no handler for SIGHUP, which would end them without a checkpoint; SIGUSR1 asks for one.
        self._sent = number if number == signal.SIGTERM else signal.SIGUSR1
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(self._sent)


def verdict(codes: list[int | None]) -> int:
    """One exit code for all ranks: a mistake, else a bug, else a loss (a rank that was killed, or hangs), else a stop."""
    known = {EXIT_LOST if code is None or code < 0 else code for code in codes} - {0}
    ours = (EXIT_USER_ERROR, EXIT_LOST, EXIT_STOPPED)
    bugs = sorted(known.difference(ours))
    return next((code for code in (EXIT_USER_ERROR, *bugs, *ours) if code in known), 0)


def restartable_command(script: str, arguments: list[str]) -> list[str]:
    """The rank's own command line: the supervisor's without its own options."""
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in ("--max-restarts", "--ranks"):
            skip = True
        elif not argument.startswith(("--max-restarts=", "--ranks=")):
            kept.append(argument)
    return [sys.executable, script, *kept]
