"""Requeue guard: a job that is stopped again and again without a newer checkpoint is not queued once more.

A batch script that requeues its job after EXIT_STOPPED says in $FEDMOE_MAX_REQUEUES how many requeues in a row may bring
nothing. Where start-up takes longer than the time limit minus the signal's lead, none ever will. The count is kept in the run
folder, under the run's lock, and begins again with every job and every newer checkpoint; pre-training that has come further
counts as one. The stop that is one too many ends as a mistake does: EXIT_USER_ERROR, which no script requeues.

A start that is stopped before it comes here (imports, the meeting of ranks) cannot count. It ends as a loss does
(`stop_request.py`), which the script counts itself: losses in a row without a newer checkpoint, too. Where checkpoints are it
learns from the file $FEDMOE_RUN_FILE.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from fedmoe_ds.checkpoint.reader import candidates, read_snapshot
from fedmoe_ds.distributed.stop_request import MAX_REQUEUES
from fedmoe_ds.errors import UserError
from fedmoe_ds.storage.files import write_whole
from fedmoe_ds.storage.strict_json import read_json

FILE = "requeues.json"
"""In the run folder."""
RUN_FILE = "FEDMOE_RUN_FILE"
"""Of the environment: where a batch script wants to be told which run folder its job has."""


class _Count(BaseModel):
    """What the file holds: the job, how far its run was (`RequeueGuard._progress`), and stops that brought it no further."""

    model_config = ConfigDict(strict=True, extra="forbid")

    job: str
    progress: list[int] | None = None
    kept: str | None = None
    stops: Annotated[int, Field(ge=0)] = 0

    def surpassed_by(self, progress: list[int] | None) -> bool:
        """Whether a newer checkpoint is there. One that was found damaged since leaves an older one, which is none."""
        return progress is not None and (self.progress is None or progress > self.progress)


class RequeueGuard:
    """Of one start. Its methods are called by rank 0, under the lock of the run folder.

    Args:
        folder: of the run.
        environment: of the process.
    Raises:
        UserError: the limit is no number.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder, self.path = folder, folder / FILE
        self.limit, self.job = _limit(environment.get(MAX_REQUEUES)), environment.get("SLURM_JOB_ID", "")
        self.told = environment.get(RUN_FILE) or None

    def begin(self) -> None:
        """A start has the run folder. Raises UserError: the count cannot be written, or the script cannot be told."""
        self._tell()
        if self.limit is None:
            return
        known, progress = self._read(), self._progress()
        # A start that was killed may have brought a checkpoint all the same.
        if known.job != self.job or known.surpassed_by(progress):
            self._write(_Count(job=self.job, progress=progress))

    def stopped(self, signal: str, kept: str, seconds: float) -> None:
        """The start ends because it was asked to.

        Args:
            kept: what is kept of work that no checkpoint holds, in words; "" for nothing.
            seconds: since the start began.
        Raises:
            UserError: requeues have brought nothing for too long.
        """
        if self.limit is None:
            return
        known, progress = self._read(), self._progress()
        # A stop may come while rank 0 waits for the folder, before `begin`: what another job has counted is not its own.
        if known.job != self.job:
            known = _Count(job=self.job, progress=progress)
        newer = known.surpassed_by(progress)
        stops = 0 if newer or (kept != "" and kept != known.kept) else known.stops + 1
        farthest = progress if newer else known.progress
        self._write(_Count(job=self.job, progress=farthest, kept=kept or known.kept, stops=stops))
        if stops > self.limit:
            raise UserError(
                f"{MAX_REQUEUES}: {self.limit}: the job was stopped {stops} times in a row without a newer checkpoint"
                f"{_where(progress)}, now by {signal} {seconds:.0f} s after it was started: starting takes longer than the "
                "time limit minus the signal's lead; raise the limit (--time), prepare before the job (fedmoe prepare), or "
                "allow more stops (MAX_REQUEUES)"
            )

    def _progress(self) -> list[int] | None:
        """What the newest checkpoint holds: rounds, and how many clients of the one that has begun; None for nothing."""
        for path in candidates(self.folder / "checkpoints"):
            try:
                snapshot = read_snapshot(path)
            except (OSError, UserError):  # damaged: a start does not continue it either
                continue
            found = [snapshot.round, len((snapshot.partial or {}).get("done", ()))]
            return found if any(found) else None
        return None

    def _read(self) -> _Count:
        try:
            return _Count.model_validate(read_json(self.path))
        except (OSError, ValueError):  # the first start, or a damaged file: counted from here on
            return _Count(job="")

    def _tell(self) -> None:
        if self.told is None:
            return
        try:
            write_whole(Path(self.told), f"{self.folder.absolute()}\n")
        except OSError as error:
            raise UserError(f"{RUN_FILE}: {self.told}: cannot be written: {error.strerror or error}; unset it") from None

    def _write(self, count: _Count) -> None:
        try:
            write_whole(self.path, count.model_dump_json())
        except OSError as error:
            raise UserError(
                f"output: {self.path}: cannot be written: {error.strerror or error}; without it requeues would have no end"
            ) from None


def _limit(given: str | None) -> int | None:
    if given is None or given == "":
        return None
    if not (given.isascii() and given.isdigit()):
        raise UserError(f"{MAX_REQUEUES}: {given}: is no number of requeues; give 0 or more")
    return int(given)


def _where(progress: list[int] | None) -> str:
    return " (there is none yet)" if progress is None else f" (the newest is of round {progress[0]})"
