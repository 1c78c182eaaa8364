"""Long work: what ranks do before the first round (pre-training, preparation of data, loading), ended by a stop request.

Nothing can be saved in a checkpoint yet, and one rank may work for minutes while the others wait for it. Whoever works looks up
at its stop points, about once a second, and all ranks exchange whether they were asked to stop. So a request to any rank is
heard by all, and they leave together or go on together; nor does any rank wait in one collective for minutes. The exchange is
also how a rank that works alone reports progress: `topology.timeout_s` counts from the last one, however long the work takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

from fedmoe_ds.distributed.runtime import Runtime, attempt
from fedmoe_ds.distributed.stop_points import StopError, heard_by
from fedmoe_ds.distributed.stop_request import StopRequest
from fedmoe_ds.errors import UserError

T = TypeVar("T")
_EVERY_S = 1.0
"""Between two exchanges: a rank that works waits in each for the others' steps to end."""


class LongWork:
    """The ranks at work. Its methods are collective: every rank calls them in the same order."""

    def __init__(self, runtime: Runtime, stop: StopRequest) -> None:
        self.runtime, self.stop = runtime, stop
        self._due = 0.0

    @property
    def rank(self) -> int:
        return self.runtime.rank

    def gather(self, value: Any) -> list[Any]:
        """As `Runtime.gather`."""
        return self.runtime.gather(value)

    def run_on_all_ranks(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank; a UserError on any rank becomes the same UserError on all of them.

        Raises:
            StopError: a rank was asked to stop, and not all of them had finished.
        """
        self._due = time.monotonic() + _EVERY_S
        with heard_by(self._look_up, lambda: self.stop.requested):
            result, failure = attempt(action)
        told = self._exchange(True, failure)
        # A rank that has finished goes on exchanging, because the others still do so at their stop points.
        while not all(done for done, _ in told):
            told = self._exchange(True, failure)
        failures = [text for _, text in told if text is not None]
        if failures:
            # The lowest rank's, so that all ranks raise the same text.
            raise UserError(failures[0])
        return result  # type: ignore[return-value]

    def run_on_rank0(self, action: Callable[[], Any]) -> Any:
        """Run `action` on rank 0 only; its JSON result or UserError reaches every rank. Raises StopError as the other."""
        return self.gather(self.run_on_all_ranks(lambda: action() if self.runtime.is_main else None))[0]

    def _look_up(self) -> None:
        """A stop point of the work on this rank."""
        # A rank that was asked to stop does not wait for its time; the exchange ends when the others come to theirs.
        if self.stop.requested or time.monotonic() >= self._due:
            self._exchange(False, None)
            self._due = time.monotonic() + _EVERY_S

    def _exchange(self, done: bool, failure: str | None) -> list[tuple[bool, str | None]]:
        """Whether each rank has finished, and how. Work that all have finished is not thrown away."""
        told = self.gather([done, failure, self.stop.name])
        signals = [name for _, _, name in told if name is not None]
        if signals and not all(done for done, _, _ in told):
            raise StopError(signals[0])
        return [(done, failure) for done, failure, _ in told]
