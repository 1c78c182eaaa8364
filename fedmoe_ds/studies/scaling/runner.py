"""Runner: brings the runs of a study to their end one after the other, and stops cleanly when asked to.

Only one group of ranks runs at a time: two would take each other's cores, and the figures would be theirs.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from fedmoe_ds.errors import EXIT_LOST, EXIT_STOPPED, EXIT_USER_ERROR, UserError
from fedmoe_ds.machine import machine_facts
from fedmoe_ds.report import formats
from fedmoe_ds.storage.files import write_whole
from fedmoe_ds.studies.child import Child
from fedmoe_ds.studies.compare.plan import Run
from fedmoe_ds.studies.resources import cores, in_allocation
from fedmoe_ds.studies.runner import locked
from fedmoe_ds.studies.scaling.measured import machine_file
from fedmoe_ds.studies.scaling.point import Point

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_POLL_S, _REPEAT_S = 0.1, 1.0


@dataclass
class Outcome:
    """Exit codes and reasons of the runs that failed, by name; `stopped` says whether a signal ended the study."""

    codes: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    stopped: bool = False

    @property
    def exit_code(self) -> int:
        """0; 75 after a stop; the code of the failures where all are of one kind (a mistake, a lost rank); else 1."""
        if self.stopped:
            return EXIT_STOPPED
        kinds = set(self.codes.values())
        return 0 if not kinds else kinds.pop() if kinds in ({EXIT_LOST}, {EXIT_USER_ERROR}) else 1


class Runner:
    """Runs points.

    Args:
        script: launch/train.py.
        environment: of the ranks.
        note: takes a line for the user.
    """

    def __init__(self, script: Path, environment: Mapping[str, str], note: Callable[[str], None]) -> None:
        self.script, self.environment, self.note = script, environment, note
        self._requests: list[str] = []

    def run(self, points: Sequence[Point]) -> Outcome:
        """Bring every run to its end, its failure, or a checkpoint after a signal; a second one kills (but never SIGUSR1)."""
        queue = [(point, run) for point in points for run in point.runs]
        waiting = [(point, run) for point, run in queue if not run.finished]
        if len(waiting) < len(queue):
            self.note(f"{len(queue) - len(waiting)} of {len(queue)} runs are finished already")
        outcome = Outcome()
        with self._listening():
            for number, (point, run) in enumerate(waiting, start=len(queue) - len(waiting) + 1):
                if self._requests:
                    break
                with locked(run.folder) as lock:
                    self._note_machine(run)
                    group = Child(run, self.script, point.ranks, self.environment, lock, in_allocation(self.environment))
                    self._wait(group)
                    self._settle(group, f"[{number}/{len(queue)}] {run.name}", outcome)
        outcome.stopped |= bool(self._requests)
        return outcome

    def _wait(self, group: Child) -> None:
        told = 0.0
        while group.poll() is None:
            time.sleep(_POLL_S)
            if self._requests and time.monotonic() - told > _REPEAT_S:
                told = time.monotonic()
                group.stop() if len(self._requests) == 1 else group.kill()

    def _settle(self, group: Child, head: str, outcome: Outcome) -> None:
        """Say how a group ended."""
        code, run = group.poll(), group.run
        if run.finished:
            self.note(f"{head}: {formats.duration(group.seconds)}")
        elif self._requests or code == EXIT_STOPPED:
            outcome.stopped = True
            self._requests.append("SIGUSR1")  # sent to the ranks by somebody else: a stop of the study all the same
            self.note(f"{head}: stopped after round {run.history().last_round}; the same command continues it")
        else:
            outcome.codes[run.name], outcome.reasons[run.name] = code or 1, group.reason()
            self.note(f"{head}: failed: {outcome.reasons[run.name]} ({group.log})")

    def _note_machine(self, run: Run) -> None:
        """The machine beside the run: metrics.jsonl does not know how many cores the ranks share."""
        facts = machine_facts() | {"cores": cores(self.environment)}
        try:
            write_whole(machine_file(run), json.dumps(facts, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"--output: {machine_file(run)}: cannot be written: {error.strerror or error}") from None

    @contextmanager
    def _listening(self) -> Iterator[None]:
        def receive(number: int, frame: FrameType | None) -> None:
            if self._requests and number == signal.SIGUSR1:
                return  # a scheduler may well ask twice; only a person or SIGTERM means more than the first time
            self._requests.append(signal.Signals(number).name)
            if len(self._requests) == 1:
                self.note("stopping: the run saves a checkpoint after its wave; a second signal kills it")

        before = {number: signal.signal(number, receive) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
