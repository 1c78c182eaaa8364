"""Runner: brings the runs of a study to their end, a few at a time, and stops them cleanly when asked to."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from fedmoe_ds.errors import EXIT_LOST, EXIT_STOPPED, EXIT_USER_ERROR, UserError
from fedmoe_ds.report import formats
from fedmoe_ds.storage.folder_lock import FolderLock
from fedmoe_ds.studies.child import Child
from fedmoe_ds.studies.gpus import gpus_of
from fedmoe_ds.studies.run import Run
from fedmoe_ds.terminal import note

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_POLL_S, _REPEAT_S = 0.1, 1.0
_COUNTED = (EXIT_USER_ERROR, EXIT_LOST)
"""What a run means by these it means after a signal, too: one stop too many (`requeue_guard.py`), one that saved nothing."""


@dataclass
class Outcome:
    """Exit codes and reasons of the runs that failed, by name; `stopped` says whether a signal ended the study."""

    codes: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    stopped: bool = False

    @property
    def exit_code(self) -> int:
        """0; 75 after a stop; the code of the failures where all are of one kind (a mistake, a lost rank); else 1.

        After a stop a mistake comes before a lost rank, and both before 75, which a batch script requeues without counting.
        """
        kinds = set(self.codes.values())
        if self.stopped:
            return next((code for code in _COUNTED if code in kinds), EXIT_STOPPED)
        return 0 if not kinds else kinds.pop() if kinds in ({EXIT_LOST}, {EXIT_USER_ERROR}) else 1


@dataclass
class Runner:
    """Runs a study.

    Args:
        script: what trains a run.
        environment: of the runs.
        note: takes a line for the user.
        jobs: runs at once.
        by_slurm: start ranks with srun, inside of an allocation.
        prepare: called with every run before it starts.
        result: what to say of a run that has ended, beside the time it took.
    """

    script: Path
    environment: Mapping[str, str]
    note: Callable[[str], None]
    jobs: int = 1
    by_slurm: bool = False
    prepare: Callable[[Run], None] | None = None
    result: Callable[[Run], str] | None = None
    _requests: list[str] = field(default_factory=list, init=False)

    def run(self, runs: Sequence[Run], lock: int | None = None) -> Outcome:
        """Bring every run to its end, its failure, or a checkpoint after a signal; a second one kills (but never SIGUSR1).

        Args:
            lock: that of the whole study, inherited by its runs; None locks the folder of every run while it is at work.
        Raises:
            UserError: a run's folder is held by another process, or cannot be written.
        """
        waiting = [run for run in runs if not run.finished]
        self._total, self._done = len(runs), len(runs) - len(waiting)
        if self._done:
            self.note(f"{self._done} of {self._total} runs are finished already")
        outcome, active, told = Outcome(), dict[Child, ExitStack](), 0.0
        with self._listening(), ExitStack() as locks:
            while active or (waiting and not self._requests):
                while len(active) < self.jobs and not self._requests and (run := _next(waiting, active)):
                    waiting.remove(run)
                    own = locks.enter_context(ExitStack())  # released with its run; the outer one is for an exception
                    slot = min(set(range(self.jobs)) - {child.slot for child in active})
                    active[self._start(run, lock, own, slot)] = own
                time.sleep(_POLL_S)
                for child in [child for child in active if child.poll() is not None]:
                    with active.pop(child):
                        self._settle(child, outcome)
                # Again and again: a rank that still imports has not begun to listen.
                if self._requests and time.monotonic() - told > _REPEAT_S:
                    told = time.monotonic()
                    for child in active:
                        child.stop() if len(self._requests) == 1 else child.kill()
        outcome.stopped = bool(self._requests)
        return outcome

    def _start(self, run: Run, lock: int | None, own: ExitStack, slot: int) -> Child:
        inherited = own.enter_context(locked(run.folder)) if lock is None else lock
        if self.prepare is not None:
            self.prepare(run)
        # SLURM gives the ranks of an allocation theirs itself.
        gpus = [] if self.by_slurm else gpus_of(run, slot, self.environment)
        return Child(run, self.script, self.environment, inherited, self.by_slurm, slot, gpus)

    def _settle(self, child: Child, outcome: Outcome) -> None:
        """Say how a child ended."""
        run, code = child.run, child.poll()
        if run.finished:
            self._done += 1
            said = [formats.duration(child.seconds), *([self.result(run)] if self.result else [])]
            self.note(f"[{self._done}/{self._total}] {run.name}: {'; '.join(said)}")
        elif code == EXIT_STOPPED or (self._requests and code not in _COUNTED):
            if not self._requests:  # somebody else asked the ranks themselves: a stop of the study all the same
                self._requests.append("SIGUSR1")
            self.note(f"{run.name}: stopped after round {run.history().last_round}; the same command continues it")
        else:
            outcome.codes[run.name], outcome.reasons[run.name] = code or 1, child.reason()
            self.note(f"{run.name}: failed: {outcome.reasons[run.name]} ({child.log})")

    @contextmanager
    def _listening(self) -> Iterator[None]:
        def receive(number: int, frame: FrameType | None) -> None:
            if self._requests and number == signal.SIGUSR1:
                return  # a scheduler may well ask twice; only a person or SIGTERM means more than the first time
            self._requests.append(signal.Signals(number).name)
            if len(self._requests) == 1:
                self.note("stopping: every run saves a checkpoint after its wave; a second signal kills them")

        before = {number: signal.signal(number, receive) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _next(waiting: Sequence[Run], active: Iterable[Child]) -> Run | None:
    """The next run to start. The first run of a seed makes the foundation and the data that its others find in the cache."""
    # Two that start together would both make the foundation, and the slower one for nothing.
    preparing = {child.run.seed for child in active} - {child.run.seed for child in active if child.run.begun}
    return next((run for run in waiting if run.seed not in preparing), None)


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Hold a folder, made if it is missing. Raises UserError when it cannot be written or is held by another."""
    lock = FolderLock(
        folder,
        ".lock",
        lambda who: UserError(f"--output: {folder}: a study, or a run it left behind, is at work there; wait or end it: {who}"),
        lambda path, reason: UserError(f"--output: {path}: cannot be written: {reason}; give another folder"),
    )
    try:
        for line in lock.take():
            note(line)
        yield lock.handle
    finally:
        lock.release()
