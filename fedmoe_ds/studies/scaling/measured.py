"""Measured: what metrics.jsonl of a finished run says about time.

A round lasts from one `round` event to the next, so everything is in it: training, aggregation, evaluation, and what the
checkpoint of the round before takes, which begins after its event. The first round of every start warms up (caches, compiled
kernels, page faults) and is not timed.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedmoe_ds.config import load_config
from fedmoe_ds.errors import UserError
from fedmoe_ds.machine import commit, machine_facts
from fedmoe_ds.report import Record
from fedmoe_ds.report.client_tables import numbers
from fedmoe_ds.report.events import Machine
from fedmoe_ds.report.history import Event
from fedmoe_ds.report.record import ROWS
from fedmoe_ds.storage.files import write_whole
from fedmoe_ds.storage.strict_json import read_json
from fedmoe_ds.studies.resources import cores
from fedmoe_ds.studies.run import Run

PHASES = ("train", "aggregate", "evaluate")
ALL_TO_ALL = "all_to_all"


@dataclass(frozen=True)
class Measured:
    """One finished run. Figures are means over the timed rounds; phases and collectives are those of rank 0.

    Attributes:
        hosts: machines that the ranks were on.
        rounds: those that were timed; without any there are no figures.
        tokens, flops: trained in a round by all clients, forward and backward; flops None where a client's are not recorded.
        seconds: of a round, wall clock; `round_seconds` of each that was timed.
        recorded: seconds of the `round` event, which ends before the checkpoint; what a prediction is about.
        phases: seconds of `train`, `aggregate`, `evaluate`, and of everything else as `other`; they add up to `seconds`.
        collectives: seconds inside collectives by name, a part of the phases; None where the run did not record them, and on a
            GPU where it was not the device that timed them.
        peak_mib: peak memory of every rank in order, on its GPU where it has one; or None.
        cores: CPU cores that all ranks shared, or None.
        device: `cpu` or the GPU's name, or None. `dtype`: of the frozen weights.
        ranks_on: the host of every rank, in order.
        machines: what every host is, where the run has recorded it.
    """

    ranks: int
    clusters: int
    ep_size: int
    clients: int
    hosts: int
    rounds: tuple[int, ...]
    tokens: float
    flops: float | None
    seconds: float
    recorded: float
    phases: Mapping[str, float]
    collectives: Mapping[str, float] | None
    peak_mib: tuple[float, ...] | None
    cores: int | None
    digest: str
    bitwise: bool
    versions: Mapping[str, str]
    machine: Mapping[str, Any]
    round_seconds: tuple[float, ...] = ()
    device: str | None = None
    dtype: str = "auto"
    ranks_on: tuple[str, ...] = ()
    machines: Sequence[Mapping[str, Any]] = ()

    @property
    def federated_s(self) -> float:
        """Seconds of training alone: local training and the sums, in which ranks wait for the slowest cluster."""
        return self.phases["train"] + self.phases["aggregate"]


def machine_file(run: Run) -> Path:
    """Where the study notes the machine of a run."""
    return Path(f"{run.folder}.machine.json")


def note_machine(run: Run, environment: Mapping[str, str]) -> None:
    """Write it beside the run: metrics.jsonl does not know how many cores the ranks share. Raises UserError."""
    path, facts = machine_file(run), machine_facts() | {"cores": cores(environment), "commit": commit()}
    try:
        write_whole(path, json.dumps(facts, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--output: {path}: cannot be written: {error.strerror or error}") from None


def measure(run: Run) -> Measured:
    """The figures of a finished run. Raises UserError where its record lacks one, or the note about its machine is damaged."""
    path = run.metrics
    events = list(Record(path))
    try:
        return _measured(events, _machine(machine_file(run)), _dtype(run))
    except (LookupError, StopIteration, TypeError) as error:  # every field may be absent, or null: old runs have fewer
        what = f"{error.args[0]} is" if isinstance(error, LookupError) and error.args else "an event or a field is"
        raise UserError(
            f"{path}: {what} missing, so no time can be told; remove the folder, and measure the run again"
        ) from error


def _machine(path: Path) -> dict[str, Any]:
    try:
        facts = read_json(path) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}; remove it") from None
    try:
        Machine.model_validate(facts)
    except ValidationError:
        raise UserError(f"{path}: describes no machine; remove it") from None
    return dict(facts)


def _dtype(run: Run) -> str:
    """The type of the frozen weights as the run has saved it: `auto` is what its device and its model have made of it."""
    path = run.folder / "config.yaml"
    return (load_config(path) if path.exists() else run.config).foundation.dtype


def _measured(events: Sequence[Event], machine: dict[str, Any], dtype: str) -> Measured:
    facts = next(event for event in events if event["event"] == "run")
    end = next(event for event in reversed(events) if event["event"] == "end")
    timed = timed_rounds(events)
    spent = [_phases(seconds, event) for seconds, event in timed]
    peaks = end.get("device_peak_bytes") or end.get("peak_bytes")
    return Measured(
        ranks=facts["world_size"],
        clusters=facts["clusters"],
        ep_size=facts["ep_size"],
        clients=facts["clients"],
        hosts=len({row["host"] for row in facts["topology"]}),
        rounds=tuple(event["round"] for _, event in timed),
        tokens=_mean([event["tokens"] for _, event in timed]),
        flops=_flops(events, [event["round"] for _, event in timed]),
        seconds=_mean([seconds for seconds, _ in timed]),
        round_seconds=tuple(seconds for seconds, _ in timed),
        recorded=_mean([event["seconds"] for _, event in timed]),
        phases={name: _mean([part[name] for part in spent]) for name in (*PHASES, "other")},
        collectives=_collectives([event for _, event in timed], facts),
        peak_mib=tuple(count / 2**20 for count in peaks) if peaks else None,
        cores=machine.get("cores"),
        digest=str(end.get("digest")),
        bitwise=facts["reproducible"] == "bitwise",
        versions={str(name): str(version) for name, version in facts["versions"].items()},
        machine=machine,
        device=facts.get("device"),
        dtype=dtype,
        ranks_on=tuple(str(row["host"]) for row in facts["topology"]),
        machines=facts.get("machines") or [],
    )


def timed_rounds(events: Sequence[Event]) -> list[tuple[float, Event]]:
    """(wall seconds, event) of every round that follows another one in the same start of the run."""
    timed: list[tuple[float, Event]] = []
    before: float | None = None
    for event in events:
        # The first round of a start warms up, and before it lies whatever time the run was down.
        if event["event"] in ("run", "resume"):
            before = None
        elif event["event"] == "round":
            if before is not None:
                timed.append((event["time"] - before, event))
            before = event["time"]
    return timed


def _phases(seconds: float, event: Event) -> dict[str, float]:
    spent = {name: float(event["phases"].get(name) or 0.0) for name in PHASES}
    # Phases and events have clocks of their own, so the phases may be longer than the round by a hair.
    return spent | {"other": max(0.0, seconds - sum(spent.values()))}


def _collectives(rounds: Sequence[Event], facts: Event) -> dict[str, float] | None:
    # A run continued by a version that records them has rounds with and without.
    if not rounds or any("collectives" not in event for event in rounds):
        return None
    # Earlier versions timed the host on a GPU, too: how long it takes to queue a collective, which says nothing.
    if facts.get("device", "cpu") != "cpu" and facts.get("collectives_timed") != "device":
        return None
    total: dict[str, float] = defaultdict(float)
    for event in rounds:
        for name, tally in event["collectives"].items():
            if tally["seconds"] is None:
                return None
            total[name] += tally["seconds"] / len(rounds)
    return dict(total)


def _flops(events: Sequence[Event], rounds: Sequence[int]) -> float | None:
    spent = [value for event in events if event.get("round") in rounds for value in _client_flops(event)]
    # Without some of the clients the sum would pass for a lower throughput.
    known = [float(value) for value in spent if value is not None and math.isfinite(value)]
    return sum(known) / len(rounds) if known and len(known) == len(spent) else None


def _client_flops(event: Event) -> list[float | None]:
    """Those of the clients that an event is about; none of another event."""
    if event["event"] == "client":
        return [event.get("flops")]
    if event["event"] == "table" and event["of"] == "client":
        return [*numbers(event[ROWS].read(), "flops").tolist()]
    return []


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
