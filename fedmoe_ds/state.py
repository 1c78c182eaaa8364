"""State: what survives from round to round, and how it is written to and read from checkpoints.

Legend: L layers, E experts, N clients.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmoe_ds import checkpoint
from fedmoe_ds.adapters.bank import Bank, BlockSpec
from fedmoe_ds.aggregation.statistics import Statistics
from fedmoe_ds.runtime import Runtime
from fedmoe_ds.topology import Topology


@dataclass
class Progressed:
    """How far an unfinished round has come (the same on every rank).

    Attributes:
        done: client index -> what it reported, for metrics.
        activation: tier (k) -> routed rows per (layer, expert).
        seconds: training time spent on it before an interruption.
    """

    done: dict[int, dict[str, Any]] = field(default_factory=dict)
    activation: dict[int, np.ndarray] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class State:
    """Everything that a resumed run needs.

    Attributes:
        round: rounds completed.
        adapters: the global adapters, one client slot; expert blocks hold this rank's experts.
        personal: by block name, [N, L, *item]: every client's own state, replicated on all ranks.
        progressed, statistics: an unfinished round; the sums are complete on cluster 0 and zero elsewhere.
    """

    round: int
    adapters: Bank
    personal: dict[str, Tensor]
    progressed: Progressed | None = None
    statistics: Statistics | None = None


def save(
    root: Path,
    runtime: Runtime,
    topology: Topology,
    state: State,
    identity: dict[str, Any],
    config: str,
    position: int,
    keep: int,
) -> Path:
    """Write a checkpoint of this state; see `checkpoint.save` for errors. `position` is the length of metrics.jsonl."""
    tensors: dict[str, dict[str, Tensor]] = {}
    if topology.cluster == 0:
        shard, count = topology.shard, topology.layout.ep_size
        mine = _adapter_tensors(state.adapters, topology, shard == 0)
        tensors[f"adapters-{shard:05d}-of-{count:05d}.safetensors"] = mine
        if state.statistics is not None:
            sums = dict(_sum_places(state.statistics, topology, shard == 0))
            tensors[f"sums-{shard:05d}-of-{count:05d}.safetensors"] = sums
    if runtime.is_main and state.personal:
        tensors["personal.safetensors"] = dict(state.personal)
    partial = None
    if state.progressed is not None:
        partial = {
            "done": {str(index): report for index, report in state.progressed.done.items()},
            "activation": {str(tier): counts.tolist() for tier, counts in state.progressed.activation.items()},
            "seconds": state.progressed.seconds,
        }
    snapshot = checkpoint.Snapshot(state.round, identity, position, partial)
    return checkpoint.save(root, runtime, snapshot, tensors, {"config.yaml": config}, keep)


def restore(path: Path, snapshot: checkpoint.Snapshot, state: State, topology: Topology, statistics: Statistics) -> None:
    """Read a checkpoint into `state`, whatever topology wrote it; `statistics` receives the sums of an unfinished round."""
    first = _first_expert(state.adapters, topology)
    with checkpoint.TensorReader(path, "adapters") as reader:
        for key, _, value in state.adapters.items(first):
            reader.read_into(key, value)
    if state.personal:
        with checkpoint.TensorReader(path, "personal") as reader:
            for name, value in state.personal.items():
                reader.read_into(name, value)
    state.round = snapshot.round
    if snapshot.partial is None:
        return
    activation = {int(k): np.array(counts, dtype=np.int64) for k, counts in snapshot.partial["activation"].items()}
    state.progressed = Progressed(
        {int(index): report for index, report in snapshot.partial["done"].items()},
        activation if topology.rank == 0 else {},  # counts are summed over ranks when the round ends
        snapshot.partial["seconds"],
    )
    if topology.cluster == 0:
        with checkpoint.TensorReader(path, "sums") as reader:
            for key, value in _sum_places(statistics, topology, include_dense=topology.shard == 0):
                reader.read_into(key, value)
    state.statistics = statistics


def _first_expert(bank: Bank, topology: Topology) -> int:
    held = [value.shape[1] for name, value in bank.values.items() if bank.specs[name].expert]
    return topology.shard * held[0] if held else 0


def _adapter_tensors(bank: Bank, topology: Topology, include_dense: bool) -> dict[str, Tensor]:
    first = _first_expert(bank, topology)
    return {key: value for key, spec, value in bank.items(first) if spec.expert or include_dense}


def _sum_places(statistics: Statistics, topology: Topology, include_dense: bool) -> list[tuple[str, Tensor]]:
    """(name, view) of every sum held here, by layer and global expert id."""
    places = []
    for spec in statistics.specs:
        if not spec.expert and not include_dense:
            continue
        for side, sums in (("values", statistics.values), ("weights", statistics.weights)):
            places += [(f"{key}/{side}", view) for key, view in _views(spec, sums[spec.name].limbs, topology)]
    return places


def _views(spec: BlockSpec, limbs: Tensor, topology: Topology) -> list[tuple[str, Tensor]]:
    views = []
    for i, layer in enumerate(spec.layers):
        if not spec.expert:
            views.append((spec.key(layer), limbs[:, i]))
            continue
        first = topology.shard * limbs.shape[2]
        views += [(spec.key(layer, first + e), limbs[:, i, e]) for e in range(limbs.shape[2])]
    return views


def initial_personal(blocks: list[BlockSpec], values: list[float]) -> dict[str, Tensor]:
    """Personal state before the first round: client n's blocks are filled with `values[n]`."""
    column = torch.tensor(values, dtype=torch.float32)
    personal = {}
    for spec in blocks:
        if spec.personal:
            shape = (len(values), len(spec.layers), *spec.item)
            personal[spec.name] = column.view(-1, *([1] * (len(shape) - 1))).expand(shape).clone()
    return personal
