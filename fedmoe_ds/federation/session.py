"""Session: one start of a run: claim the run folder, resume or begin, train, report."""

from __future__ import annotations

import platform
import socket
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fedmoe_ds.checkpoint import reader as checkpoint
from fedmoe_ds.checkpoint import state as states
from fedmoe_ds.checkpoint.writer import remove_unfinished
from fedmoe_ds.clients.client import tiers_of
from fedmoe_ds.config import Config, idle_keys
from fedmoe_ds.distributed.activity import activity
from fedmoe_ds.distributed.runtime import Runtime
from fedmoe_ds.distributed.stop_points import StopError
from fedmoe_ds.distributed.stop_request import StopRequest
from fedmoe_ds.distributed.topology import Topology, build_topology
from fedmoe_ds.errors import EXIT_STOPPED, UserError
from fedmoe_ds.federation.build import Parts, load_parts
from fedmoe_ds.federation.deepspeed_tools import DeepSpeedTools
from fedmoe_ds.federation.identity import check_identity, check_no_effect
from fedmoe_ds.federation.journal import Journal
from fedmoe_ds.federation.rounds import Federation, Outcome
from fedmoe_ds.kernels import fault
from fedmoe_ds.kernels.frozen_layers import row_dtype
from fedmoe_ds.kernels.lora_products import products_for
from fedmoe_ds.machine import peak_mib
from fedmoe_ds.report import final_table, read_metrics
from fedmoe_ds.storage import cache
from fedmoe_ds.storage.files import make_folder
from fedmoe_ds.storage.folder_lock import FolderLock
from fedmoe_ds.terminal import visible


@dataclass(frozen=True)
class Ending:
    """How a start ended: the lines for standard output (rank 0's; empty elsewhere), and the exit code."""

    lines: list[str]
    exit_code: int


def train(config: Config, runtime: Runtime, resume: str, stop: StopRequest) -> Ending:
    """Run a configuration to its end or to a stop request: with a checkpoint, or, while loading, with what is in the cache.

    Args:
        config: the whole tree.
        stop: listens already.
        resume: `never` (a folder that holds a run is refused), `auto` (continue from the newest intact checkpoint, or begin).
    """
    lock = FolderLock(Path(config.output) / config.name)
    try:
        return _train(config, runtime, resume, stop, lock)
    finally:
        lock.release()


def _train(config: Config, runtime: Runtime, resume: str, stop: StopRequest, lock: FolderLock) -> Ending:
    began = time.monotonic()
    activity.enter("load")
    fault.guard(f"rank {runtime.rank} on {socket.gethostname()}")
    folder = Path(config.output) / config.name
    source = runtime.run_on_rank0(lambda: {"unlocked": lock.take(), **claim_folder(folder, resume)})
    journal = Journal(folder, runtime)
    for note in [*runtime.notes, *source["unlocked"], *source["notes"]]:
        journal.note(note)
    topology = build_topology(config.topology, runtime)
    try:
        parts = load_parts(config, runtime, topology, journal.progress, stop)
    except StopError as stopped:
        journal.close()
        lines = [f"{stopped}; start the same command again to continue"]
        return Ending(lines if runtime.is_main else [], EXIT_STOPPED)
    if (ignored := cache.line(runtime.gather(cache.passed_over()))) is not None:
        journal.note(ignored)
    journal.note(start_line(parts))
    if (omitted := parts.data.omissions.line()) is not None:
        journal.note(omitted)
    if source["ended"] is not None and source["ended"]["rounds"] == config.federation.rounds:
        runtime.run_on_all_ranks(lambda: open_snapshot(Path(source["checkpoint"]), parts))
        journal.close()
        return Ending(summary(folder, Outcome(source["ended"]["digest"], None), runtime), 0)
    tools = DeepSpeedTools(config.deepspeed, parts, journal)  # a package may be missing: before anything is written
    runtime.run_on_rank0(lock.confirm)
    begin(parts, journal, source["checkpoint"])
    outcome = Federation(parts, journal).run()
    tools.close(folder)
    if outcome.interrupted is None:
        spent = {"seconds": time.monotonic() - began, "peak_bytes": runtime.gather(int(peak_mib() * 2**20))}
        journal.event("end", rounds=parts.state.round, digest=outcome.digest, **spent)
    journal.report()
    journal.close()
    return Ending(summary(folder, outcome, runtime), 0 if outcome.interrupted is None else EXIT_STOPPED)


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
    found, notes = checkpoint.newest_intact(root)
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
    events = read_metrics(metrics)
    last = events[-1] if events else {"event": ""}
    return any(event["event"] == "round" for event in events), last if last["event"] == "end" else None


def begin(parts: Parts, journal: Journal, source: str | None) -> None:
    """Start from the foundation, or restore a checkpoint; either way say so in metrics.jsonl."""
    if source is None:
        journal.truncate(0)
        journal.config(parts.config_text)
        journal.event("run", **run_facts(parts))
        journal.event("data", **data_facts(parts))
        return
    path = Path(source)
    snapshot, notes = parts.runtime.run_on_all_ranks(lambda: restore(path, parts))
    for note in notes:
        journal.note(note)
    activity.enter("load", snapshot.round)
    journal.truncate(snapshot.metrics_position)
    journal.config(parts.config_text)
    journal.event(
        "resume",
        round=snapshot.round,
        checkpoint=path.name,
        world_size=parts.runtime.world_size,
        topology=rank_table(parts),
    )
    journal.note(f"resumed from {path.name}")


def open_snapshot(path: Path, parts: Parts) -> tuple[checkpoint.Snapshot, list[str]]:
    """What a checkpoint says, and notes about it, on every rank. Raises UserError where this start cannot continue it."""
    try:
        snapshot = checkpoint.read_snapshot(path)
    except OSError as error:
        raise unreadable(path, parts, error) from None
    notes = check_identity(snapshot.identity, path, parts.identity, parts.config)
    rounds = parts.config.federation.rounds
    if snapshot.round + (snapshot.partial is not None) > rounds:
        done = f"is in the middle of round {snapshot.round + 1}" if snapshot.partial else f"has {snapshot.round} rounds"
        least = snapshot.round + (snapshot.partial is not None)
        raise UserError(
            f"federation.rounds: {rounds}: the checkpoint to continue {done}; set {least} or more, or use another name"
        )
    if snapshot.round == rounds:
        check_no_effect(path, parts.config)
    return snapshot, notes


def restore(path: Path, parts: Parts) -> tuple[checkpoint.Snapshot, list[str]]:
    """Read a checkpoint into the state of the run, on every rank."""
    snapshot, notes = open_snapshot(path, parts)
    _check_progress(path, snapshot, parts)
    try:
        states.restore(path, snapshot, parts.state, parts.topology, parts.new_sums(snapshot.round + 1))
        parts.server.load_base(parts.state.server)
    except OSError as error:
        raise unreadable(path, parts, error) from None
    return snapshot, notes


def _check_progress(path: Path, snapshot: checkpoint.Snapshot, parts: Parts) -> None:
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


def unreadable(path: Path, parts: Parts, error: OSError) -> UserError:
    return UserError(
        f"output: {path}: rank {parts.runtime.rank} cannot read it: {error.strerror or error}; "
        "put the runs on a file system that all ranks share"
    )


def start_line(parts: Parts) -> str:
    """Who runs what, in one line, the grouped kernel included."""
    layout, launch = parts.topology.layout, parts.runtime.launch
    dtype, device = row_dtype(parts.foundation.model), parts.runtime.device
    config = parts.config
    kernel = products_for(config.adapters.rank, dtype, device, config.execution.adapter_kernels).name
    paired = any(spec.expert and spec.pair for spec in parts.spec.blocks)
    products = f"; adapter products by {kernel}" if paired else ""
    mode = "bitwise" if parts.spec.bitwise else "fast"
    return (
        f"{layout.world_size} ranks ({launch.launcher}, {parts.runtime.device.type}) = {layout.clusters} clusters x ep_size "
        f"{layout.ep_size}; {len(parts.clients)} clients; {mode}{products}{_without_effect(config)}"
    )


def _without_effect(config: Config) -> str:
    idle = idle_keys(config)
    return f"; without effect: {', '.join(idle)}" if idle else ""


def rank_table(parts: Parts) -> list[dict[str, int | str]]:
    topology: Topology = parts.topology
    return topology.layout.table(parts.spec.expert_layout.num_experts, topology.hosts)


def run_facts(parts: Parts) -> dict[str, Any]:
    """The `run` event."""
    config, foundation = parts.config, parts.foundation
    packages = ("torch", "deepspeed", "transformers", "fedmoe-ds")
    return {
        "name": config.name,
        "method": config.method.name,
        "without_effect": idle_keys(config),
        "world_size": parts.runtime.world_size,
        "launcher": parts.runtime.launch.launcher,
        "clusters": parts.topology.layout.clusters,
        "ep_size": config.topology.ep_size,
        "clients": len(parts.clients),
        "num_experts": parts.spec.expert_layout.num_experts,
        "top_k": parts.spec.expert_layout.top_k,
        "layers": len(parts.spec.expert_layout.layers),
        "tiers": sorted({client.top_k for client in parts.clients}, reverse=True),
        "budgets": budgets(parts),
        "foundation": foundation.fingerprint,
        "foundation_code": foundation.code,
        "seed": config.seed,
        "reproducible": "bitwise" if parts.spec.bitwise else "fast",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "device": str(parts.runtime.device) if parts.runtime.device.type == "cpu" else torch.cuda.get_device_name(),
        "topology": rank_table(parts),
    }


def budgets(parts: Parts) -> list[dict[str, Any]]:
    """What the clients of every tier have to spend, the largest tier first."""
    return [
        {"tier_label": tier, "top_k": first.top_k, "active_experts": first.cap, "rank": first.rank,
         "experts": first.experts, "clients": 1 + len(others)}
        for tier, (first, *others) in tiers_of(parts.clients).items()
    ]  # fmt: skip


def data_facts(parts: Parts) -> dict[str, Any]:
    """The `data` event."""
    clients = [
        {"name": c.name, "samples": c.samples, "sequences": c.sequences, "tokens": c.targets, "targets": c.targets,
         "top_k": c.top_k, "tier_label": c.tier}
        for c in parts.clients
    ]  # fmt: skip
    data = parts.data
    told = {"distribution": data.distribution, "omissions": data.omissions.as_dict(), "fingerprint": data.fingerprint}
    return {"clients": clients, **told}


def summary(folder: Path, outcome: Outcome, runtime: Runtime) -> list[str]:
    """What the user reads last; the final two lines are a stable interface."""
    if not runtime.is_main:
        return []
    lines = [final_table(read_metrics(folder / "metrics.jsonl"))]
    if outcome.interrupted is not None:
        lines.append(
            f"stopped by {outcome.interrupted} with a checkpoint; start the same command with --resume auto to continue"
        )
    return [*lines, f"digest: {outcome.digest}", f"run: {visible(folder)}"]
