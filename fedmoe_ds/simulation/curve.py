"""Curve: the same federation at several numbers of ranks, clients or participants, one row each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedmoe_ds.config import Config
from fedmoe_ds.errors import UserError
from fedmoe_ds.planner.hardware import Hardware
from fedmoe_ds.planner.memory import format_bytes
from fedmoe_ds.planner.text import aligned, two_digits
from fedmoe_ds.planner.world import World, world_of
from fedmoe_ds.simulation.federation import Simulated, resolved, simulate
from fedmoe_ds.simulation.setting import Setting
from fedmoe_ds.simulation.walls import walls

AXES = ("ranks", "clients", "participants")
HEADER = ("rounds/hour", "per rank", "per host", "between hosts", "failures/day", "run", "nearest wall")


@dataclass(frozen=True)
class Curve:
    """Values of one axis."""

    axis: str
    values: list[int]

    @classmethod
    def parse(cls, words: Sequence[str]) -> Curve:
        """Of what stands after `--curve`. Raises UserError."""
        axis, *numbers = words
        if axis not in AXES:
            raise UserError(f"--curve: {axis}: choose one of {', '.join(AXES)}, then its values")
        if not numbers:
            raise UserError(f"--curve: {axis}: no values; name them, for instance --curve {axis} 8 64 512")
        for word in numbers:
            if not word.isdecimal() or int(word) < 1:
                raise UserError(f"--curve: {word}: must be a whole number of {axis}, 1 or more")
        return cls(axis, [int(word) for word in numbers])

    def points(self, config: Config, world: World, hardware: Hardware, setting: Setting) -> Iterator[Simulated]:
        """Simulate every value. Raises UserError for one that a start would refuse, with the value."""
        job = resolved(config, hardware)
        for value in self.values:
            there, asked = world, setting
            if self.axis == "ranks":
                # Hosts as they were, unless fewer ranks than one has are asked for.
                there = world_of(None, min(value, world.ranks_per_host), value, hardware)
            elif self.axis == "clients":
                asked = replace(setting, clients=value)
            else:
                asked = replace(setting, participants=value)
            yield simulate(config, there, hardware, asked, job)

    def lines(self, found: Sequence[Simulated]) -> list[str]:
        """A table; times as ranges where the hardware's efficiencies are assumed."""
        rows = [[f"{value}", *_cells(one)] for value, one in zip(self.values, found, strict=True)]
        return aligned((self.axis, *HEADER), rows)

    def data(self, found: Sequence[Simulated]) -> list[dict[str, Any]]:
        """For a JSON file."""
        return [{self.axis: value, **figures(one)} for value, one in zip(self.values, found, strict=True)]


def per_hour(simulated: Simulated) -> str:
    """Rounds per hour without failures, slowest first."""
    rates = [3600.0 / (factor * simulated.mean_round) for factor in sorted({*simulated.hardware.spread}, reverse=True)]
    return " to ".join(_digits(rate, len(rates)) for rate in rates)


def days(simulated: Simulated) -> str:
    """Days or hours of the whole run with checkpoints and failures."""
    spent = [simulated.run_seconds(factor) / 86400.0 for factor in sorted({*simulated.hardware.spread})]
    # Hours where days are none.
    unit, each = ("days", 1.0) if spent[-1] >= 2.0 else ("hours", 24.0)
    return " to ".join("never" if math.isinf(day) else _digits(each * day, len(spent)) for day in spent) + f" {unit}"


def _digits(value: float, values: int) -> str:
    """Two digits of each end of a range, four of a single figure; no exponents."""
    return two_digits(value) if values > 1 else f"{value:.4g}"


def format_size(size: float) -> str:
    """Bytes of a whole job."""
    for unit, each in (("PiB", 2**50), ("TiB", 2**40)):
        if size >= each:
            return f"{size / each:.1f} {unit}"
    return format_bytes(size)


def links(simulated: Simulated) -> dict[str, float]:
    """Bytes of the whole job in a round by class of links; every cluster as the slowest one: an upper bound."""
    found = {"inside hosts": 0.0, "between hosts": 0.0, "control plane": 0.0}
    for name, traffic in simulated.first.traffic.items():
        if name == "control":
            found["control plane"] += traffic.inside + traffic.between
        else:
            found["inside hosts"] += traffic.inside
            found["between hosts"] += traffic.between
    found = {name: size * simulated.world.ranks for name, size in found.items()}
    written = simulated.storage.checkpoint / simulated.job.config.checkpoint.every + simulated.storage.record
    return found | {"storage": written}


def figures(simulated: Simulated) -> dict[str, Any]:
    """All figures of one simulation, for a JSON file."""
    failures, checkpointing = simulated.failures, simulated.checkpointing()
    first = simulated.first
    return {
        "ranks": simulated.world.ranks,
        "hosts": simulated.world.hosts,
        "hardware": simulated.hardware.name,
        "spread": list(simulated.hardware.spread),
        "clients": len(simulated.job.clients),
        "participants": simulated.drawn,
        "rounds": simulated.total_rounds,
        "round_s": dict(zip(simulated.rounds, simulated.round_seconds, strict=True)),
        "seconds": {name: seconds for name, seconds in first.seconds.items() if name != "evaluate"},
        "evaluation_s": simulated.evaluation_s,
        "rounds_per_hour": 3600.0 / simulated.mean_round,
        "seed_s": simulated.seconds,
        "bytes": links(simulated),
        "memory": simulated.memory,
        "host_memory": simulated.host_memory,
        "spilled": simulated.spilled,
        "rank_0_s": {"drawing": simulated.drawing_s, "scheduling": simulated.scheduling_s, "record": simulated.record_s},
        "failures_per_day": failures.per_day,
        "restart_s": failures.restart,
        "checkpoint_s": simulated.write_s,
        "young_s": failures.young(simulated.write_s),
        "daly_s": failures.daly(simulated.write_s),
        "checkpoint_every": checkpointing.best(failures, simulated.total_rounds),
        "run_s": _finite(simulated.run_seconds()),
        "walls": [{"name": w.name, "x": w.x, "at": w.at, "used": _finite(w.used), "moves": w.moves} for w in walls(simulated)],
    }


def _finite(value: float) -> float | None:
    """None for a run that never ends: JSON has no infinity."""
    return value if math.isfinite(value) else None


def _cells(simulated: Simulated) -> list[str]:
    nearest = walls(simulated)[0]
    return [
        per_hour(simulated),
        format_bytes(simulated.device_bytes),
        format_bytes(simulated.host_bytes),
        format_size(links(simulated)["between hosts"]),
        f"{simulated.failures.per_day:.2g}",
        days(simulated),
        f"{nearest.name} ({100 * nearest.used:.3g} %)",
    ]
