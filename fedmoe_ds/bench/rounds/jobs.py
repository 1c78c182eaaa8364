"""Round jobs: the real runs that the round benchmark times: `launch/train.py` on a random model and the standard library.

A round lasts from one `round` event to the next. The `round` event says what its phases took and the `checkpoint` event what
saving took; what is in none of them is `other`. The first round of a run warms up (caches, page faults) and is left out.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedmoe_ds.bench.harness.checks import check_least
from fedmoe_ds.bench.harness.jobs import run_job
from fedmoe_ds.bench.harness.shapes import Shape, check_positions, write_with_tokenizer
from fedmoe_ds.bench.harness.table import Row
from fedmoe_ds.data import stdlib
from fedmoe_ds.errors import UserError
from fedmoe_ds.studies.scaling.measured import timed_rounds

TRAINING = ("passes", "optimizer")
"""Phases that any training has; everything else is outside."""
WAVE = ("passes", "optimizer", "set_up", "reports")
PHASES = (*WAVE, "fold", "aggregate", "schedule", "checkpoint", "other", "evaluate")

_QUIET = {"every": 1_000_000, "max_sequences": 1, "client_sequences": 0}
_MAX_SAMPLES = 64

Sections = Mapping[str, dict[str, Any]]
"""Keys of a configuration by section."""


@dataclass(frozen=True)
class RoundWorkload:
    """A federation whose rounds are timed: `steps` local steps of `sequences` sequences for every client, `rounds` timed."""

    shape: Shape
    clients: int = 8
    steps: int = 20
    sequences: int = 1
    length: int = 128
    rounds: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("clients", 1), ("steps", 1), ("sequences", 1), ("length", 8), ("rounds", 1), ("seed", 0)):
            check_least(f"--{name}", getattr(self, name), least)
        check_positions(self.length)
        if self.sequences > _MAX_SAMPLES // 2:
            raise UserError(f"--sequences: {self.sequences}: a client has {_MAX_SAMPLES}; use {_MAX_SAMPLES // 2} or less")

    def facts(self) -> Row:
        """What every row says about the workload."""
        names = ("clients", "steps", "sequences", "length", "rounds", "seed")
        return {**{name: getattr(self, name) for name in names}, **self.shape.facts()}


@dataclass(frozen=True)
class RoundTime:
    """One round: wall seconds, trained tokens, and what the phases took; they add up to the seconds."""

    seconds: float
    tokens: int
    phases: dict[str, float]

    @property
    def without_evaluation(self) -> float:
        return self.seconds - self.phases["evaluate"]


@dataclass(frozen=True)
class Timed:
    """The timed rounds of a run, and the largest peak of a rank in MiB."""

    rounds: list[RoundTime]
    peak_mib: float

    def token_seconds(self) -> list[float]:
        """Seconds per token of every round, evaluation left out: it is a setting."""
        return [one.without_evaluation / one.tokens for one in self.rounds]


@dataclass(frozen=True)
class RoundJobs:
    """Runs of one workload in one folder, which holds the model and the prepared data."""

    load: RoundWorkload
    folder: Path

    @classmethod
    def prepare(cls, load: RoundWorkload, folder: Path) -> RoundJobs:
        """Write the model and its tokenizer, trained on the half of the library that clients do not have.

        The vocabulary of the tiny shape is raised to that of a tokenizer of bytes.
        """
        texts = [document.text for document in stdlib.split(stdlib.documents())[0]]
        shape = write_with_tokenizer(load.shape, load.seed, folder / "model", texts)
        return cls(replace(load, shape=shape), folder)

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def run(self, name: str, sections: Sections | None = None, ranks: int = 1) -> Timed:
        """Run to the end under a name that is used once. Sections are merged over those of `tree`."""
        done = run_job(self.tree(name, sections or {}), self.folder, ranks)
        return Timed(round_times(done.events), max(done.peak.values()) / 2**20)

    def tree(self, name: str, sections: Sections) -> dict[str, Any]:
        """The configuration: defaults of a run, but for what the workload says. Evaluated is nothing where nothing is asked."""
        load = self.load
        tree: dict[str, Any] = {
            "name": name,
            "output": str(self.folder / "runs"),
            "seed": load.seed,
            "foundation": {"path": str(self.model), "cache": str(self.folder / "cache")},
            "federation": {"rounds": load.rounds + 1},  # the first one is not timed
            "local": {"steps": load.steps, "batch_size": load.sequences},
            "data": {"sequence_length": load.length, "max_samples": _MAX_SAMPLES, "partition": {"clients": load.clients}},
            "execution": {"reproducible": "fast"},
            "evaluation": _QUIET,
        }
        for section, keys in sections.items():
            tree[section] = {**tree.get(section, {}), **keys}
        return tree


def round_times(events: Sequence[Mapping[str, Any]]) -> list[RoundTime]:
    """Every round but the first of a run. `wave_seconds` are those of rank 0's cluster, phases those of rank 0."""
    saved = {event["round"]: event["seconds"] for event in events if event["event"] == "checkpoint"}
    return [_round_time(seconds, event, saved.get(event["round"] - 1, 0.0)) for seconds, event in timed_rounds(events)]


def _round_time(seconds: float, event: Mapping[str, Any], checkpoint: float) -> RoundTime:
    """The checkpoint in the time of a round is that of the round before: it begins after its event."""
    phases, wave = event["phases"], event["wave_seconds"]
    spent = {name: wave[name] for name in WAVE}
    spent["fold"] = phases["train"] - sum(spent.values())
    spent |= {name: phases[name] for name in ("aggregate", "schedule", "evaluate")}
    spent["checkpoint"] = checkpoint
    spent["other"] = seconds - sum(spent.values())
    return RoundTime(seconds, event["tokens"], {name: spent[name] for name in PHASES})


def medians(rounds: Sequence[RoundTime]) -> dict[str, float]:
    """Median seconds of every phase."""
    return {name: statistics.median(one.phases[name] for one in rounds) for name in PHASES}
