"""Resumption: which checkpoints a start may continue, and how one becomes the state of its run."""

from __future__ import annotations

from pathlib import Path

from fedmoe_ds.checkpoint import state
from fedmoe_ds.checkpoint.reader import Snapshot, read_snapshot
from fedmoe_ds.devices.flight import state_of
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation.build import Parts
from fedmoe_ds.federation.identity import GONE, START, check_identity, check_no_effect


def open_snapshot(path: Path, parts: Parts) -> tuple[Snapshot, list[str]]:
    """What a checkpoint says, and notes about it, on every rank. Raises UserError where this start cannot continue it."""
    try:
        snapshot = read_snapshot(path)
    except OSError as error:
        raise _unreadable(path, parts, error) from None
    notes = check_identity(snapshot.identity, path, parts.identity, parts.config)
    if parts.start is not None and parts.identity[START] == GONE:
        began = parts.identity[START] = snapshot.identity.get(START)
        notes += [f"{line} (adapters of sha256 {str(began)[:12]})" for line in parts.start.notes]
    rounds = parts.config.federation.rounds
    # An interrupted round counts: its sums are there, and dropping them would lose what clients have trained.
    if snapshot.round + (snapshot.partial is not None) > rounds:
        done = f"is in the middle of round {snapshot.round + 1}" if snapshot.partial else f"has {snapshot.round} rounds"
        least = snapshot.round + (snapshot.partial is not None)
        raise UserError(
            f"federation.rounds: {rounds}: the checkpoint to continue {done}; set {least} or more, or use another name"
        )
    # The run is finished: there only keys that still change something may differ.
    if snapshot.round == rounds:
        check_no_effect(path, parts.config)
    return snapshot, notes


def restore(path: Path, parts: Parts) -> tuple[Snapshot, list[str]]:
    """Read a checkpoint into the state of the run, on every rank."""
    snapshot, notes = open_snapshot(path, parts)
    # Before the first tensor is read: a failure afterwards would leave the state half restored.
    _check_progress(path, snapshot, parts)
    # Who takes part in the round follows from it.
    parts.state.clock = state_of(snapshot.clock)
    if parts.spec.method.chooses_rank:
        parts.send_down(snapshot.sent_down)
    try:
        state.restore(path, snapshot, parts.state, parts.topology, lambda: parts.new_sums(snapshot.round + 1))
        # Merged weights are the server's state, but the model computes with its own copy of them.
        parts.server.load_base(parts.state.server)
    except OSError as error:
        raise _unreadable(path, parts, error) from None
    return snapshot, notes


def _check_progress(path: Path, snapshot: Snapshot, parts: Parts) -> None:
    """Refuse counts of another model's experts, and reports of clients that there are not."""
    partial = snapshot.partial or {"activation": {}, "done": {}}
    for counts in (snapshot.utilisation, *partial["activation"].values()):
        shape = None if counts is None else (len(counts), len(counts[0]) if counts else 0)
        if shape is not None and shape != parts.counts_shape:
            raise UserError(
                f"checkpoint: {path}: counts of {shape[0]} layers with {shape[1]} experts, and this model has "
                f"{parts.counts_shape[0]} with {parts.counts_shape[1]}; remove this checkpoint to go on from the one before"
            )
    unknown = [index for index in partial["done"] if int(index) >= len(parts.clients)]
    if unknown:
        raise UserError(
            f"checkpoint: {path}: partial.done: client {unknown[0]}: the run has {len(parts.clients)} clients; remove this "
            "checkpoint to go on from the one before"
        )


def _unreadable(path: Path, parts: Parts, error: OSError) -> UserError:
    return UserError(
        f"output: {path}: rank {parts.runtime.rank} cannot read it: {error.strerror or error}; "
        "put the runs on a file system that all ranks share"
    )
