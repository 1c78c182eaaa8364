"""State: what survives from round to round, and how it is written to and read from checkpoints.

Legend: L layers, E experts, N clients.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fedmoe_ds.aggregation.round_sums import RoundSums
from fedmoe_ds.checkpoint import memories
from fedmoe_ds.checkpoint.personal_files import BEGINNING
from fedmoe_ds.checkpoint.personal_reader import PersonalReader
from fedmoe_ds.checkpoint.personal_state import Personal
from fedmoe_ds.checkpoint.reader import CLIENTS, Snapshot, TensorReader
from fedmoe_ds.checkpoint.writer import CheckpointWriter, Tensors
from fedmoe_ds.devices.flight import ClockState, saved_state
from fedmoe_ds.distributed.topology import Topology
from fedmoe_ds.errors import UserError
from fedmoe_ds.model.adapter_bank import Bank, BlockSpec

SUMS_LAYOUT = 2
"""How an unfinished round's sums lie in a checkpoint: digits and windows (`aggregation/exact_sum.py`)."""


@dataclass
class PartialRound:
    """How far an unfinished round has come (the same on every rank, once they have met).

    Attributes:
        done: client index -> what it reported, for metrics.
        activation: label of a tier -> routed rows per (layer, expert).
        seconds: training time spent on it before an interruption.
        known: clients of `done` whose reports all ranks have; the others' are those of this rank alone.
        memories: client index -> what the server knows of it when the round is over; known as `done` is.
    """

    done: dict[int, dict[str, Any]] = field(default_factory=dict)
    activation: dict[str, np.ndarray] = field(default_factory=dict)
    seconds: float = 0.0
    known: frozenset[int] = frozenset()
    memories: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)

    def counts_LE(self, shape: tuple[int, int]) -> np.ndarray:
        """Routed rows over all clients (once ranks have shared them)."""
        return sum(self.activation.values(), np.zeros(shape, dtype=np.int64))

    @property
    def tokens(self) -> int:
        """Token rows over all clients (once ranks have met)."""
        return sum(report["tokens"] for report in self.done.values())


@dataclass
class State:
    """Everything that a resumed run needs.

    Attributes:
        round: rounds completed.
        adapters: the global adapters, one client slot; expert blocks hold this rank's experts.
        personal: every client's own state.
        server: the server's own state by name, shaped like the adapters: moments, control or dual variables, merged base
            weights.
        utilisation_LE: routed rows per (layer, expert) over all clients of the last finished round, or None.
        partial, sums: an unfinished round; the sums are complete on cluster 0 and zero elsewhere.
        clock: the virtual clock of simulated devices after the last finished round; that of the beginning where there are none.
        sent_down: numbers of the products that clients of the next round receive, of methods that choose their rank; else 0.
    """

    round: int
    adapters: Bank
    personal: Personal
    server: dict[str, Bank] = field(default_factory=dict)
    utilisation_LE: np.ndarray | None = None
    partial: PartialRound | None = None
    sums: RoundSums | None = None
    clock: ClockState = field(default_factory=ClockState)
    sent_down: int = 0


def save(
    writer: CheckpointWriter,
    topology: Topology,
    state: State,
    identity: dict[str, Any],
    config: str,
    position: int,
    clients: list[str],
    best: int | None = None,
) -> None:
    """Begin a checkpoint of this state; see `CheckpointWriter.begin`.

    Args:
        config: the resolved configuration.
        position: the length of metrics.jsonl.
        clients: names of all clients, in the order of their numbers.
        best: the round whose checkpoint stays.
    """
    # Every cluster holds the same state; the first one writes it. What is the clients' own every rank writes of those at home.
    tensors: dict[str, Tensors | Callable[[], Tensors]] = {}
    if topology.cluster == 0:
        shard, count = topology.shard, topology.layout.ep_size
        tail = f"{shard:05d}-of-{count:05d}.safetensors"
        tensors[f"adapters-{tail}"] = _mine(state.adapters.items(_first_expert(state.adapters, topology)), topology)
        for name, bank in state.server.items():
            theirs = _mine(bank.items(_first_expert(bank, topology)), topology)
            # A tensor that is as every start makes it need not be written: `restore` leaves it as it finds it.
            changed = theirs if bank.changed is None else theirs.keys() & bank.changed
            tensors[f"server.{name}-{tail}"] = {key: value for key, value in theirs.items() if key in changed}
        if state.sums is not None:
            tensors[f"sums-{tail}"] = dict(_sum_places(state.sums, topology, shard == 0))
        if shard == 0:
            tensors |= _memories(state)
    partial = None
    if state.partial is not None:
        partial = {
            "done": {str(index): report for index, report in state.partial.done.items()},
            "activation": {tier: counts.tolist() for tier, counts in state.partial.activation.items()},
            "seconds": state.partial.seconds,
            "sums": SUMS_LAYOUT,
        }
    used = None if state.utilisation_LE is None else state.utilisation_LE.tolist()
    # Without devices it stays as it began, and is not written.
    clock = None if state.clock == ClockState() else saved_state(state.clock)
    snapshot = Snapshot(state.round, identity, position, partial, used, clock=clock, sent_down=state.sent_down)
    personal, plan = state.personal.to_write()
    # Numbers of clients without their names would say nothing to whoever has the checkpoint alone.
    headers = {name: {CLIENTS: json.dumps(clients)} for name, rows in plan.write.items() if rows == [BEGINNING]}
    state.personal.files.source = writer.begin(
        snapshot, {**tensors, **personal}, {"config.yaml": config}, best, headers, plan.keep, plan.source
    )


def _memories(state: State) -> dict[str, Tensors | Callable[[], Tensors]]:
    """The file of what the server knows of clients, if it knows anything: before this round, and from the part that is done."""
    known = memories.tensors(state.personal.memories, "known")
    learnt = {} if state.partial is None else memories.tensors(state.partial.memories, "learnt")
    return {memories.FILE: known | learnt} if known or learnt else {}


def _counts_LE(rows: list[list[int]]) -> np.ndarray:
    """Counts out of a manifest; [0, 0] where there are no experts, which an empty list does not say."""
    return np.array(rows, dtype=np.int64).reshape(len(rows), len(rows[0]) if rows else 0)


def restore(path: Path, snapshot: Snapshot, state: State, topology: Topology, empty_sums: Callable[[], RoundSums]) -> None:
    """Read a checkpoint into `state`, whatever topology wrote it.

    `empty_sums` makes what receives the sums of an unfinished round. It is called when all else has been read: who takes part
    in the round, and with them the room that sums need, may follow from what the server knows of its clients.

    Raises UserError where that round's sums are those of another version.
    """
    # First of all, as long as nothing of `state` has been overwritten.
    if snapshot.partial is not None and snapshot.partial.get("sums") != SUMS_LAYOUT:
        raise UserError(
            f"checkpoint: {path}: its round {snapshot.round + 1} is unfinished and was added up by another version; "
            "remove this folder: the run goes on from the round before"
        )
    read_tensors(path, snapshot, state, topology.shard)
    state.round = snapshot.round
    state.utilisation_LE = None if snapshot.utilisation is None else _counts_LE(snapshot.utilisation)
    if snapshot.partial is None:
        return
    activation = {tier: _counts_LE(counts) for tier, counts in snapshot.partial["activation"].items()}
    state.partial = PartialRound(
        {int(index): report for index, report in snapshot.partial["done"].items()},
        activation if topology.rank == 0 else {},  # counts are summed over ranks when the round ends
        snapshot.partial["seconds"],
        memories=memories.read(path, snapshot.files, "learnt"),
    )
    sums = empty_sums()
    # On one cluster alone: the end of the round adds up the clusters, and a second copy would count twice.
    if topology.cluster == 0:
        with TensorReader(path, "sums", snapshot.files) as reader:
            for key, value in _sum_places(sums, topology, include_dense=topology.shard == 0):
                reader.read_into(key, value)
    state.sums = sums


def read_tensors(path: Path, snapshot: Snapshot, state: State, shard: int = 0) -> None:
    """Fill adapters, personal and server state of this shard from a checkpoint."""
    first = shard * state.adapters.experts
    with TensorReader(path, "adapters", snapshot.files) as reader:
        # `items` gives views, so reading into them fills the adapters themselves.
        for key, _, value in state.adapters.items(first):
            reader.read_into(key, value)
    state.personal.memories = memories.read(path, snapshot.files, "known")
    if state.personal:
        with PersonalReader(path, snapshot.files, state.personal.homes) as own:
            state.personal.restore(own)
    for name, bank in state.server.items():
        with TensorReader(path, f"server.{name}-", snapshot.files) as reader:
            # What a warm start has changed is in every checkpoint of its run; the rest stays as every start makes it.
            assert all(key in reader for key in bank.changed or ()), "what the checkpoint leaves out would stay as it is now"
            for key, _, value in bank.items(shard * bank.experts):
                if bank.changed is None or key in reader:
                    before = value.clone()
                    reader.read_into(key, value)
                    bank.note_change(key, before, value)


def _first_expert(bank: Bank, topology: Topology) -> int:
    return topology.shard * bank.experts


def _mine(items: Iterator[tuple[str, BlockSpec, Tensor]], topology: Topology) -> dict[str, Tensor]:
    """What this rank of cluster 0 writes: its experts, and on shard 0 the dense blocks."""
    return {key: value for key, spec, value in items if spec.expert or topology.shard == 0}


def _sum_places(sums: RoundSums, topology: Topology, include_dense: bool) -> list[tuple[str, Tensor]]:
    """(name, view) of every sum held here, by layer and global expert id."""
    return [
        (f"{key}/{side}", view)
        for spec, side, lead, tensor in sums.tensors()
        if spec.expert or include_dense
        for key, view in _views(spec, tensor, lead, topology)
    ]


def _views(spec: BlockSpec, tensor: Tensor, lead: int, topology: Topology) -> list[tuple[str, Tensor]]:
    """Per layer (and expert): the slice of a tensor whose axes before the layer axis number `lead`."""
    views = []
    for i, layer in enumerate(spec.layers):
        of_layer = tensor.select(lead, i)
        if not spec.expert:
            views.append((spec.key(layer), of_layer))
            continue
        first = topology.shard * of_layer.shape[lead]
        views += [(spec.key(layer, first + e), of_layer.select(lead, e)) for e in range(of_layer.shape[lead])]
    return views
