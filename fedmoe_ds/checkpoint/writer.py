"""Checkpoint writer: one checkpoint at a time, written while the next round trains, or at once.

Every rank of the first cluster writes its tensors into a folder beside the checkpoint's place, and notes their sha256 in
another; so does every rank with what it keeps of clients, and with what a checkpoint shares with the one before. Rank 0 waits
for all notes, adds the manifest and renames the folder, so a reader never sees half a checkpoint. In the background this is
done by threads, which take no part in collectives: they meet in the file system that all ranks share. The main threads meet in
`begin` and `finish`, where a full disk on any rank becomes the same error on all.
"""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from fedmoe_ds.checkpoint.keeping import prune, take_over
from fedmoe_ds.checkpoint.reader import FORMAT, MANIFEST, PRIVATE, Snapshot, checksum, folder_name, sha256_of
from fedmoe_ds.distributed.runtime import Runtime, attempt
from fedmoe_ds.errors import UserError
from fedmoe_ds.storage.file_modes import follow_umask, keep_private, umask
from fedmoe_ds.storage.files import make_folder, remove, sync

T = TypeVar("T")
Tensors = dict[str, Tensor]
Files = Mapping[str, Tensors | Callable[[], Tensors]]
Sums = dict[str, str]
_UNFINISHED = ".writing-"
_POLL_S = 0.02
_LINGER_S = 5.0


@dataclass
class Written:
    """What a finished checkpoint cost: seconds for which the run stood still, and until every byte was on disk; `best` is the
    round that is kept for its figures. `copied`: bytes of shared files that could not be linked (of all ranks)."""

    round: int
    partial: bool
    held: float
    seconds: float
    best: int | None
    copied: int = 0


@dataclass
class _Job:
    """A checkpoint under way.

    Attributes:
        rank: of this process.
        writers: the ranks that have files.
        sums: sha256 of all their files, once the main threads have exchanged them; a file system may show the notes late.
        written: this rank's files and their sha256.
        published: seconds until every byte was on disk (None on all ranks but the first).
        best: the round whose checkpoint stays, however old it is.
        headers: what the headers of some files say beside the tensors.
        kept: this rank's files that are taken over from the folder `source`.
        known: their sha256, where this process has written that folder.
        copied, copied_by_all: bytes of these that could not be linked, and of those of all ranks.
    """

    snapshot: Snapshot
    texts: dict[str, str]
    working: Path
    notes: Path
    target: Path
    began: float
    rank: int
    writers: list[int] = field(default_factory=list)
    sums: Sums | None = None
    held: float = 0.0
    dropped: bool = False
    written: Future[Sums] | None = None
    published: Future[float] | None = None
    best: int | None = None
    headers: Mapping[str, dict[str, str]] = field(default_factory=dict)
    source: Path | None = None
    kept: Sequence[str] = ()
    known: Sums | None = None
    copied: int = 0
    copied_by_all: int = 0


class CheckpointWriter:
    """Writes the checkpoints of one run together with all ranks.

    Args:
        root: the run's checkpoint folder, on a file system that all ranks share.
        keep: newest checkpoints to keep; older ones are removed afterwards.
        background: write a copy of the tensors while the caller goes on; otherwise, and for an interrupted round, it waits.
    """

    def __init__(self, root: Path, runtime: Runtime, keep: int, background: bool) -> None:
        self.root, self.runtime, self.keep, self.background = root, runtime, keep, background
        # On rank 0 one thread writes its tensors while the other waits for the notes of all ranks.
        self._threads = ThreadPoolExecutor(2, "checkpoint")
        self._job: _Job | None = None
        # This rank's files of the checkpoint before: to read a manifest of all ranks' for them would cost ranks x ranks.
        self._before: tuple[Path, Sums] | None = None

    def begin(
        self,
        snapshot: Snapshot,
        tensors: Files,
        texts: dict[str, str],
        best: int | None = None,
        headers: Mapping[str, dict[str, str]] | None = None,
        kept: Sequence[str] = (),
        source: Path | None = None,
    ) -> Path:
        """Start to write a checkpoint, on all ranks, and say where it will be; the one before must have been finished.

        Args:
            tensors: files this rank writes: file name -> tensors by name (empty on most ranks). They may change afterwards;
                where a function makes them, it is called at some time before `finish` returns.
            texts: small text files, written by rank 0.
            best: a round whose checkpoint is kept whatever its age.
            headers: what the headers of some of these files say (safetensors' metadata).
            kept: this rank's files of the checkpoint `source` that belong to this one as well.
        Raises:
            UserError: the disk is full or not writable; what was there before is untouched.
        """
        assert self._job is None, "finish the checkpoint before"
        began = time.monotonic()
        target = self.root / folder_name(snapshot.round, snapshot.partial is not None)
        working, notes = (self.root / f"{_UNFINISHED}{kind}{target.name}" for kind in ("", "sums-"))
        job = _Job(snapshot, texts, working, notes, target, began, self.runtime.rank, best=best, headers=headers or {})
        job.kept, job.source = kept, source
        job.known = self._before[1] if self._before is not None and self._before[0] == source else None
        made = attempt(lambda: self._guarded(lambda: _fresh_folders(working, notes))) if self.runtime.is_main else (None, None)
        # It returns on every rank after rank 0 has made the folders, so no rank writes too early.
        told = self.runtime.gather([bool(tensors or kept), made[1]])
        if (failure := told[0][1]) is not None:
            raise UserError(failure)
        job.writers = [rank for rank, (writes, _) in enumerate(told) if writes]
        waits = not self.background or snapshot.partial is not None  # a run that was asked to stop has nothing else to do
        content = {
            file: part if callable(part) else partial(dict, _on_host(part, copy=not waits)) for file, part in tensors.items()
        }
        job.written = self._threads.submit(lambda: self._guarded(lambda: _write_files(job, content)))
        if self.runtime.is_main:
            job.published = self._threads.submit(lambda: self._guarded(lambda: self._publish_when_complete(job)))
        self._job = job
        if waits:
            self._wait(job)
        job.held = time.monotonic() - began
        return target

    def finish(self) -> Written | None:
        """Wait, on all ranks, until the checkpoint that was begun is complete; what it cost, or None if there was none.

        Raises:
            UserError: it could not be written; the checkpoints before it are untouched.
        """
        job = self._job
        if job is None:
            return None
        began = time.monotonic()
        seconds = self._wait(job)
        self._job = None
        held = job.held + time.monotonic() - began
        return Written(job.snapshot.round, job.snapshot.partial is not None, held, seconds, job.best, job.copied_by_all)

    def drop(self) -> None:
        """Give up what is under way, on this rank alone: the run ends with an error.

        What a slow disk leaves behind, the next start clears.
        """
        job, self._job = self._job, None
        if job is not None:
            job.dropped = True
            running: list[Future[Any]] = [future for future in (job.written, job.published) if future is not None]
            wait(running, timeout=_LINGER_S)
        if self.runtime.is_main:
            remove_unfinished(self.root)

    def _wait(self, job: _Job) -> float:
        """Seconds from the beginning to the last byte. Raises the same UserError on all ranks."""
        written, published = job.written, job.published
        assert written is not None
        try:
            mine, problem = attempt(written.result)
            told = self.runtime.gather([mine, problem, job.copied])
            if (failure := next((text for _, text, _ in told if text is not None), None)) is not None:
                raise UserError(failure)
            job.copied_by_all = sum(copied for *_, copied in told)
            job.sums = {name: value for sums, *_ in told for name, value in sums.items()}
            self._before = job.target, written.result()
            return float(self.runtime.run_on_rank0(lambda: published.result() if published is not None else 0.0))
        except UserError:
            self.drop()
            raise

    def _publish_when_complete(self, job: _Job) -> float:
        while (sums := job.sums or _noted(job)) is None:
            if job.dropped:
                return 0.0
            time.sleep(_POLL_S)
        _publish(job, sums)
        seconds = time.monotonic() - job.began
        prune(self.root, self.keep, job.target, job.best)
        return seconds

    def _guarded(self, action: Callable[[], T]) -> T:
        try:
            return action()
        except OSError as error:
            raise UserError(
                f"checkpoint: {self.root}: cannot write: {error.strerror or error}; the checkpoints already there are intact: "
                "make room, then start again with --resume auto"
            ) from None


def _on_host(tensors: Tensors, copy: bool) -> Tensors:
    if not copy:
        return {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    # Training goes on, and changes the tensors while the copy is being written.
    return {key: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for key, value in tensors.items()}


def _fresh_folders(*folders: Path) -> None:
    """Make folders that nobody else can put a link into while they are filled."""
    for folder in folders:
        make_folder(folder.parent)
        remove(folder)
        folder.mkdir(mode=0o700)


def _open_up(folder: Path) -> None:
    """Give a filled folder the mode that the user's umask says; the group that its folder hands down stays."""
    folder.chmod((0o777 & ~umask()) | (folder.stat().st_mode & stat.S_ISGID))


def _write_files(job: _Job, tensors: dict[str, Callable[[], Tensors]]) -> Sums:
    """This rank's files, those of the checkpoint before among them; the note about them appears when all are on disk."""
    sums: Sums = {}
    if job.source is not None and job.kept:
        sums, job.copied = take_over(job.source, job.working, job.kept, job.known)
    for name, content in tensors.items():
        path = job.working / name
        try:
            save_file(content(), path, job.headers.get(name))
        except Exception as error:  # safetensors wraps the operating system's error in its own
            raise OSError(None, str(error)) from error
        # Until `_open_up` the folder is closed to others, so nobody reads the file before its mode is right.
        (keep_private if name.startswith(PRIVATE) else follow_umask)(path)
        sync(path)
        sums[name] = sha256_of(path)
    if job.rank in job.writers:
        # Renamed when it is whole: rank 0 may read it at any moment.
        early = job.notes / f"{_UNFINISHED}{job.rank}"
        early.write_text("".join(f"{value} {name}\n" for name, value in sums.items()))
        early.rename(job.notes / str(job.rank))
    return sums


def _noted(job: _Job) -> Sums | None:
    """What the notes of all ranks say; None until all of them are there."""
    notes = [job.notes / str(rank) for rank in job.writers]
    if not all(note.exists() for note in notes):
        return None
    lines = [line.split(" ", 1) for note in notes for line in note.read_text().splitlines()]
    return {name: value for value, name in lines}


def _publish(job: _Job, sums: Sums) -> None:
    sums = dict(sums)
    for name, text in job.texts.items():
        path = job.working / name
        path.write_text(text)
        sync(path)
        sums[name] = sha256_of(path)
    # Files, then their folder, then the rename, then the folder above: a crash in between leaves no half checkpoint
    # under a final name.
    (job.working / MANIFEST).write_text(_manifest(job.snapshot, sums))
    sync(job.working / MANIFEST)
    sync(job.working)
    _open_up(job.working)
    if os.path.lexists(job.target):  # a damaged one, or the same interrupted round saved again
        replaced = job.target.with_name(f"{_UNFINISHED}replaced-{job.target.name}")
        # rename() replaces no folder that has something in it.
        _fresh_folders(replaced)
        job.target.rename(replaced / job.target.name)
    job.working.rename(job.target)
    sync(job.target.parent)
    remove_unfinished(job.target.parent)


def _manifest(snapshot: Snapshot, sums: dict[str, str]) -> str:
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "round": snapshot.round,
        "identity": snapshot.identity,
        "metrics_position": snapshot.metrics_position,
        "partial": snapshot.partial,
        "utilisation": snapshot.utilisation,
        "files": sums,
        # Absent where no devices are simulated: such manifests are what they were.
        **({} if snapshot.clock is None else {"clock": snapshot.clock}),
        **({"sent_down": snapshot.sent_down} if snapshot.sent_down else {}),
    }
    return json.dumps({**manifest, "checksum": checksum(manifest)}, indent=1, sort_keys=True)


def remove_unfinished(root: Path) -> None:
    """Remove what a killed or failed writer left behind."""
    for leftover in root.glob(f"{_UNFINISHED}*"):
        remove(leftover)
