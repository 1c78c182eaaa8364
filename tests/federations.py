"""Small federations for tests: a random OLMoE with top-8 of 16 experts, unequal clients, runs inside this process.

`write_inputs` lays down model and data, `make_config` describes a run on them, `alone` / `joined` are the world, `run` is what
`launch/train.py` does without the printing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedmoe_ds.aggregation.postprocessors import Postprocessor
from fedmoe_ds.checkpoint.skipped_clients import SkippedClients
from fedmoe_ds.config import Config
from fedmoe_ds.distributed.collectives import TorchSumming
from fedmoe_ds.distributed.control import Alone
from fedmoe_ds.distributed.control_plane import make_control
from fedmoe_ds.distributed.launcher import Launch
from fedmoe_ds.distributed.runtime import Runtime
from fedmoe_ds.distributed.topology import ParallelLayout, Topology, build_topology
from fedmoe_ds.federation import session
from fedmoe_ds.federation.build import Parts, load_parts, memory_settings
from fedmoe_ds.federation.journal import Journal
from fedmoe_ds.federation.rounds import Federation
from fedmoe_ds.testing.tiny_federation import MODEL, SAMPLES, TREE, tiny_tree, write_inputs

__all__ = [
    "MODEL",
    "SAMPLES",
    "TREE",
    "Result",
    "alone",
    "build",
    "finish",
    "joined",
    "leave_out",
    "make_config",
    "own_tensors",
    "own_values",
    "read_events",
    "run_alone",
    "run_joined",
    "write_inputs",
]


@dataclass(frozen=True)
class Result:
    """What a run left behind; `adapters` are those that this rank holds."""

    digest: str
    adapters: dict[str, np.ndarray]
    events: list[dict[str, Any]]
    parts: Parts

    def scores(self) -> list[tuple[Any, ...]]:
        """Every evaluation row and generated answer, exact."""
        keys = ("round", "tier", "split", "client", "loss", "accuracy", "tokens", "exact_match", "samples", "answer")
        rows = [event for event in self.events if event["event"] in ("eval", "generation")]
        return [tuple(event.get(key) for key in keys) for event in rows]


def own_values(parts: Parts) -> dict[str, torch.Tensor]:
    """What clients keep for themselves, of all of them, by block: [N, L, E, *item] or [N, L, *item]. In a world of one."""
    personal = parts.state.personal
    states = [personal.state(index) for index in range(personal.clients)]
    return {name: torch.stack([state[name] for state in states]) for name in personal.specs}


def own_tensors(parts: Parts) -> dict[str, torch.Tensor]:
    """The same by canonical key, [N, *item]."""
    personal, values = parts.state.personal, own_values(parts)
    rows_NW = torch.cat([values[name].flatten(1) for name in values], 1) if values else torch.empty(0)
    places = personal.layout.places(0, list(values))
    return {place.key: rows_NW[:, place.numbers].reshape(-1, *place.spec.item) for place in places}


def make_config(root: Path, name: str, *changes: dict[str, Any]) -> Config:
    """The small federation with nested changes, later ones over earlier ones."""
    return Config.model_validate(tiny_tree(root, name, *changes))


def alone() -> tuple[Runtime, Topology]:
    """A world of this process only; it needs no process group."""
    torch.set_num_threads(1)
    launch, none = Launch("test", 0, 1, 0), TorchSumming(None, 1)
    return Runtime(launch, torch.device("cpu"), Alone()), Topology(
        ParallelLayout(1, 1), 0, ["here"], None, None, none, none, Alone()
    )


def joined(rank: int, limit: timedelta = timedelta(minutes=5)) -> Runtime:
    """The world of `run_distributed`; `limit` is that of one message."""
    world_size = torch.distributed.get_world_size()
    launch = Launch("test", rank, world_size, rank)
    return Runtime(launch, torch.device("cpu"), make_control("torch", "test", rank, world_size, limit))


def build(config: Config, runtime: Runtime, topology: Topology) -> tuple[Parts, Journal]:
    """The parts of a run and its journal, at the beginning of round 1."""
    folder = Path(config.output) / config.name
    journal = Journal(folder, runtime)
    parts = load_parts(config, runtime, topology, journal.progress)
    session.begin(parts, journal, None)
    return parts, journal


def leave_out(parts: Parts, kept: dict[int, int]) -> None:
    """Let all clients but the first `kept` ones of those drawn be absent, as after a start that ran out of memory on them."""
    # Those who are not drawn, too: a method that plans may choose them.
    there = {index: [client.index for client in parts.participants(index)[:count]] for index, count in kept.items()}
    missing = [(index, client.index) for index in kept for client in parts.clients if client.index not in there[index]]
    settings = memory_settings(parts.config, parts.identity)
    key = parts.skipped.key
    parts.skipped = SkippedClients(parts.skipped.path.parent, settings, [json.dumps([key, *entry]) for entry in missing])
    assert parts.skipped.key == key


def finish(parts: Parts, journal: Journal, *steps: Postprocessor) -> Result:
    """Train all rounds, with more postprocessors of updates."""
    federation = Federation(parts, journal)
    federation.postprocessors += steps
    outcome = federation.run()
    journal.close()
    assert outcome.interrupted is None
    adapters = {key: value.cpu().clone().numpy() for key, _, value in parts.state.adapters.items(parts.first_expert)}
    return Result(outcome.digest, adapters, read_events(journal.folder), parts)


def run_alone(config: Config) -> Result:
    """A whole run on one rank."""
    return finish(*build(config, *alone()))


def run_joined(config: Config, runtime: Runtime) -> Result:
    """A whole run on the ranks of `run_distributed`."""
    return finish(*build(config, runtime, build_topology(config.topology, runtime)))


def read_events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
