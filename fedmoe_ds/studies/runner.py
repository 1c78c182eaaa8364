"""Runner: starts the runs of a study that are not finished, a few at a time, and stops them cleanly when asked to."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from fedmoe_ds.errors import UserError
from fedmoe_ds.report import formats
from fedmoe_ds.report.history import tier_results
from fedmoe_ds.storage.folder_lock import FolderLock
from fedmoe_ds.studies.child import Child
from fedmoe_ds.studies.compare.plan import Run
from fedmoe_ds.terminal import note

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_POLL_S, _REPEAT_S = 0.1, 1.0


@dataclass
class Outcome:
    """What became of the runs: reasons of those that failed, by name; `stopped` names the signal that ended the study."""

    failed: dict[str, str] = field(default_factory=dict)
    user_errors: set[str] = field(default_factory=set)
    stopped: str | None = None


class Runner:
    """Runs a study.

    Args:
        script: launch/train.py.
        jobs: runs at once.
        ranks: of every run; 1 is plain python.
        environment: of the children.
        note: takes a line for the user.
    """

    def __init__(
        self, script: Path, jobs: int, ranks: int, environment: Mapping[str, str], note: Callable[[str], None]
    ) -> None:
        self.script, self.jobs, self.ranks, self.environment, self.note = script, jobs, ranks, environment, note
        self._requests: list[str] = []

    def run(self, runs: Sequence[Run], lock: int) -> Outcome:
        """Bring every run to its end, its failure, or a checkpoint after a signal; a second signal kills."""
        waiting = [run for run in runs if not run.finished]
        self._total, self._done = len(runs), len(runs) - len(waiting)
        if self._done:
            self.note(f"{self._done} of {self._total} runs are finished already")
        outcome, active, told = Outcome(), list[Child](), 0.0
        with self._listening():
            while active or (waiting and not self._requests):
                while len(active) < self.jobs and not self._requests and (run := _next(waiting, active)):
                    waiting.remove(run)
                    active.append(Child(run, self.script, self.ranks, self.environment, lock))
                time.sleep(_POLL_S)
                for child in [child for child in active if child.poll() is not None]:
                    active.remove(child)
                    self._settle(child, outcome)
                if self._requests and time.monotonic() - told > _REPEAT_S:
                    told = time.monotonic()
                    for child in active:
                        child.stop() if len(self._requests) == 1 else child.kill()
        outcome.stopped = self._requests[0] if self._requests else None
        return outcome

    def _settle(self, child: Child, outcome: Outcome) -> None:
        """Say how a child ended."""
        run = child.run
        if run.finished:
            self._done += 1
            scores = [result for result in tier_results(run.history().evaluations.values()) if result.split == "global"]
            text = ", ".join(f"k={s.tier} {formats.score(s.after, 'perplexity', formats.number)}" for s in scores)
            self.note(f"[{self._done}/{self._total}] {run.name}: {formats.duration(child.seconds)}; perplexity {text}")
        elif self._requests:
            self.note(f"{run.name}: stopped after round {run.history().last_round}; the next start continues it")
        else:
            outcome.failed[run.name] = child.reason()
            if child.is_user_error:
                outcome.user_errors.add(run.name)
            self.note(f"{run.name}: failed: {outcome.failed[run.name]} ({child.log})")

    @contextmanager
    def _listening(self) -> Iterator[None]:
        def receive(number: int, frame: FrameType | None) -> None:
            self._requests.append(signal.Signals(number).name)
            if len(self._requests) == 1:
                self.note("stopping: every run saves a checkpoint after its wave; a second signal kills them")

        before = {number: signal.signal(number, receive) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _next(waiting: Sequence[Run], active: Sequence[Child]) -> Run | None:
    """The next run to start. The first run of a seed makes the foundation and the data that its others find in the cache."""
    preparing = {child.run.seed for child in active} - {child.run.seed for child in active if child.run.begun}
    return next((run for run in waiting if run.seed not in preparing), None)


@contextmanager
def locked(output: Path) -> Iterator[int]:
    """Hold the study's folder, made if it is missing. Raises UserError when it cannot be written or is held by another."""
    lock = FolderLock(
        output,
        ".lock",
        lambda who: UserError(f"--output: {output}: a study, or a run it left behind, is at work there; wait or end it: {who}"),
        lambda path, reason: UserError(f"--output: {path}: cannot be written: {reason}; give another folder"),
    )
    try:
        for line in lock.take():
            note(line)
        yield lock.handle
    finally:
        lock.release()
