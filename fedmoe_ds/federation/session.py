"""Session: one start of a run: claim the run folder, resume or begin, train, report."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmoe_ds.checkpoint.keeping import none_intact
from fedmoe_ds.checkpoint.reader import newest_intact, progress_of
from fedmoe_ds.checkpoint.writer import remove_unfinished
from fedmoe_ds.config import Config
from fedmoe_ds.data.templates.reading import reading_line
from fedmoe_ds.distributed.activity import activity
from fedmoe_ds.distributed.long_work import LongWork
from fedmoe_ds.distributed.runtime import Runtime
from fedmoe_ds.distributed.stop_points import StopError
from fedmoe_ds.distributed.stop_request import StopRequest
from fedmoe_ds.distributed.topology import build_topology
from fedmoe_ds.errors import EXIT_STOPPED, UserError
from fedmoe_ds.federation.agreement import check_same_start
from fedmoe_ds.federation.build import Parts, load_parts
from fedmoe_ds.federation.deepspeed_tools import DeepSpeedTools
from fedmoe_ds.federation.journal import Journal
from fedmoe_ds.federation.monitors import check_monitors, start_monitors
from fedmoe_ds.federation.requeue_guard import RequeueGuard
from fedmoe_ds.federation.resumption import open_snapshot, restore
from fedmoe_ds.federation.rounds import Federation, Outcome
from fedmoe_ds.federation.samples import shown_samples
from fedmoe_ds.federation.start_events import data_facts, rank_table, run_facts, start_line, versions
from fedmoe_ds.kernels import fault
from fedmoe_ds.machine import device_peak_mib, peak_mib
from fedmoe_ds.report import Record, final_table
from fedmoe_ds.storage import cache
from fedmoe_ds.storage.files import make_folder
from fedmoe_ds.storage.folder_lock import FolderLock
from fedmoe_ds.terminal import visible


@dataclass(frozen=True)
class Ending:
    """How a start ended: the lines for standard output (rank 0's; empty elsewhere), the exit code, the signal that ended it
    early, if one did, and what is kept then of work that no checkpoint holds."""

    lines: list[str]
    exit_code: int
    interrupted: str | None = None
    kept: str = ""


def train(config: Config, runtime: Runtime, resume: str, stop: StopRequest) -> Ending:
    """Run a configuration to its end or to a stop request: with a checkpoint, or, while loading, with what is in the cache.

    Args:
        config: the whole tree.
        stop: listens already.
        resume: `never` (a folder that holds a run is refused), `auto` (continue from the newest intact checkpoint, or begin).
    """
    began, folder = time.monotonic(), Path(config.output) / config.name
    check_same_start(config, runtime)
    guard = runtime.run_on_all_ranks(lambda: RequeueGuard(folder, os.environ))
    with contextlib.ExitStack() as stack:
        lock = FolderLock(folder)
        stack.callback(lock.release)

        def claim() -> dict[str, Any]:
            # The lock comes first: what another job is still writing must not be taken for what this start continues.
            claimed = {"unlocked": lock.take(), **claim_folder(folder, resume)}
            guard.begin()
            return claimed

        ending = _train(config, runtime, stop, lock, claim, stack)
        if (by := ending.interrupted) is not None:
            # Under the lock still: what it counts is in the run folder.
            runtime.run_on_rank0(lambda: guard.stopped(by, ending.kept, time.monotonic() - began))
        return ending


def _train(
    config: Config,
    runtime: Runtime,
    stop: StopRequest,
    lock: FolderLock,
    claim: Callable[[], dict[str, Any]],
    stack: contextlib.ExitStack,
) -> Ending:
    began = time.monotonic()
    activity.enter("load")
    # Before any file is mapped: a mapped file that shrinks then ends the rank with its name, not with a bus error.
    fault.guard(f"rank {runtime.rank} on {socket.gethostname()}")
    folder = Path(config.output) / config.name
    # A package may be missing: said before anything is written, and before minutes of loading.
    runtime.run_on_rank0(lambda: check_monitors(config.deepspeed))
    try:
        source = LongWork(runtime, stop).run_on_rank0(claim)
        journal = Journal(folder, runtime)
        stack.callback(journal.close)  # a process that goes on after a failure has neither its bar nor its file open
        for note in [*runtime.notes, *source["unlocked"], *source["notes"]]:
            journal.note(note)
        topology = build_topology(config.topology, runtime)
        parts = load_parts(config, runtime, topology, journal.progress, stop, source["checkpoint"])
    except StopError as stopped:
        lines = [f"{stopped}; start the same command again to continue"]
        return Ending(lines if runtime.is_main else [], EXIT_STOPPED, stopped.signal, stopped.kept)
    # Gathered on all ranks: every host may pass over entries of its own.
    if (ignored := cache.line(runtime.gather(cache.passed_over()))) is not None:
        journal.note(ignored)
    journal.note(start_line(parts))
    _tell_details(parts, journal)
    if (read := reading_line(parts.data.reading)) is not None:
        journal.note(read)
    if (omitted := parts.data.omissions.line()) is not None:
        journal.note(omitted)
    if source["ended"] is not None and source["ended"]["rounds"] == config.federation.rounds:
        # Nothing to train, but changed settings are refused all the same: the digest is not theirs.
        runtime.run_on_all_ranks(lambda: open_snapshot(Path(source["checkpoint"]), parts))
        journal.close()
        return Ending(summary(folder, Outcome(source["ended"]["digest"], None), runtime), 0)
    tools = DeepSpeedTools(config.deepspeed, parts, folder)  # it may refuse a file: before anything is written
    # Loading may take minutes, in which another host may have taken the folder; nothing of a run is written before this.
    runtime.run_on_rank0(lock.confirm)
    journal.monitor = start_monitors(config, folder, runtime, rounds_of(source["checkpoint"]))
    stack.push(lambda kind, *_: journal.close_monitor(failed=kind is not None))  # of a run that fails, too
    begin(parts, journal, source["checkpoint"])
    journal.settle()
    outcome = Federation(parts, journal).run()
    tools.close(folder)
    if outcome.interrupted is None:
        spent = {"seconds": time.monotonic() - began, **_peaks(runtime)}
        journal.event("end", rounds=parts.state.round, digest=outcome.digest, **spent)
    journal.report()
    runtime.run_on_rank0(lambda: journal.close_monitor(failed=False))  # the other ranks wait: a service may take its time
    journal.close()
    code = 0 if outcome.interrupted is None else EXIT_STOPPED
    return Ending(summary(folder, outcome, runtime), code, outcome.interrupted)


def _peaks(runtime: Runtime) -> dict[str, list[int]]:
    """Most memory that each rank has held: of its host, and of its GPU where it has one."""
    peaks = {"peak_bytes": runtime.gather(int(peak_mib() * 2**20))}
    if runtime.device.type == "cuda":
        peaks["device_peak_bytes"] = runtime.gather(int(device_peak_mib() * 2**20))
    return peaks


def _tell_details(parts: Parts, journal: Journal) -> None:
    """What `--verbose` wants to know of a start: software, and which folders it reads."""
    foundation = parts.config.foundation
    journal.detail(f"versions: {', '.join(f'{name} {number}' for name, number in versions().items())}")
    journal.detail(f"cache: {cache.root(foundation.cache)}; foundation: {parts.foundation.path}; data: {parts.data.path}")


def rounds_of(checkpoint: str | None) -> int | None:
    """Rounds that a checkpoint folder has completed, by its name."""
    progress = None if checkpoint is None else progress_of(Path(checkpoint))
    return None if progress is None else progress[0]


def claim_folder(folder: Path, resume: str) -> dict[str, Any]:
    """Decide what this start continues. Rank 0 only.

    A folder in which no round was trained holds no run: the name of a start that failed is free again.

    Returns:
        `checkpoint`: a path or None; `notes`: lines about damaged checkpoints; `ended`: the `end` event of a finished run, or
        None.
    """
    root = folder / "checkpoints"
    try:
        make_folder(root)
    except OSError as error:
        raise UserError(
            f"output: {root}: cannot be written: {error.strerror or error}; choose another output or name"
        ) from None
    # Looked for with --resume never, too: a folder that has only checkpoints holds a run as well.
    found, notes = newest_intact(root)
    trained, ended = recorded(folder / "metrics.jsonl")
    if resume == "never":
        if trained or found is not None or notes:
            raise UserError(
                f"name: {folder.name}: {folder} already holds a run; add --resume auto to continue it, or set another name"
            )
        return {"checkpoint": None, "notes": [], "ended": None}
    if ended is not None and found is None:
        raise UserError(
            f"--resume: {folder}: the run has finished and no intact checkpoint of it is left: nothing to continue; "
            "set another name"
        )
    if trained and found is None and notes:
        raise none_intact(root, notes)
    # Only under the lock: the drafts are those of killed writers.
    remove_unfinished(root)
    if found is None and (notes or trained):
        notes.append("no intact checkpoint is left; beginning again")
    if found is not None and notes:
        ended = None  # its last rounds are lost, and trained again
    return {"checkpoint": None if found is None else str(found), "notes": notes, "ended": ended}


def recorded(metrics: Path) -> tuple[bool, dict[str, Any] | None]:
    """Whether a record tells of training, and the `end` event of a finished run. Raises UserError for a damaged record."""
    if not metrics.exists():
        return False, None
    trained, last = False, dict[str, Any](event="")
    for event in Record(metrics):
        trained, last = trained or event["event"] == "round", event
    return trained, last if last["event"] == "end" else None


def begin(parts: Parts, journal: Journal, source: str | None) -> None:
    """Start from the foundation, or restore a checkpoint; either way say so in metrics.jsonl."""
    if source is None:
        journal.truncate(0)
        journal.config(parts.config_text)
        journal.event("run", **run_facts(parts))
        # Of all clients, so on the one rank that writes it (`launch/bench.py scale --curves start_events`).
        journal.data(data_facts(parts) if parts.runtime.is_main else {})
        for line in parts.start.notes if parts.start is not None else ():
            journal.note(line)
        journal.samples(shown_samples(parts))
        return
    path = Path(source)
    snapshot, notes = parts.runtime.run_on_all_ranks(lambda: restore(path, parts))
    parts.state.personal.agree(parts.runtime)
    for note in notes:
        journal.note(note)
    activity.enter("load", snapshot.round)
    # What came after the checkpoint is trained and recorded again: no round may be there twice.
    journal.truncate(snapshot.metrics_position)
    journal.config(parts.config_text)
    world = {"world_size": parts.runtime.world_size, "topology": rank_table(parts)}
    journal.event("resume", round=snapshot.round, checkpoint=path.name, **world)
    journal.note(f"resumed from {path.name}")
    # Asked for after the start: they are of the data, which are the same.
    if parts.config.data.show_samples and not parts.runtime.run_on_rank0(lambda: _has_samples(journal.log.path)):
        journal.samples(shown_samples(parts))


def _has_samples(metrics: Path) -> bool:
    return any(event["event"] == "sample" for event in Record(metrics))


def summary(folder: Path, outcome: Outcome, runtime: Runtime) -> list[str]:
    """What the user reads last; the final two lines are a stable interface."""
    if not runtime.is_main:
        return []
    lines = [final_table(Record(folder / "metrics.jsonl"))]
    if outcome.interrupted is not None:
        lines.append(
            f"stopped by {outcome.interrupted} with a checkpoint; start the same command with --resume auto to continue"
        )
    return [*lines, f"digest: {outcome.digest}", f"run: {visible(folder)}"]
