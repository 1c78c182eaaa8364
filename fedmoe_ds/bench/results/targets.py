"""Targets: what the project wants to reach in speed, and where each figure stands in the stored results.

Ratios compare systems that were measured in one run, one thread per rank. All stored runs of a benchmark count.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from fedmoe_ds.bench.baselines import federated
from fedmoe_ds.bench.harness.document import Document
from fedmoe_ds.bench.harness.repeats import Answer, Runs, decide, run_of
from fedmoe_ds.bench.harness.system import BITWISE, OURS, PEER_PREFIX
from fedmoe_ds.bench.harness.table import Row
from fedmoe_ds.report import formats

SHAPES = ("e32", "e64")
"""The shapes that targets are set for on a CPU; a result of another one, as of a quick run, reaches nothing."""
GPU_SHAPE = "olmoe-7b"
GPU_CLIENTS = 8


TOKENS = 128
"""Tokens per client and step of the CPU's targets; at more of them a peer's price per step weighs less."""


@dataclass(frozen=True)
class Measured:
    """A figure with its repetitions, run by run of the benchmark, and the peer or reference that it compares with."""

    runs: Runs
    against: str

    @property
    def samples(self) -> list[float]:
        return [value for run in self.runs for value in run]

    @property
    def value(self) -> float:
        """The median over all repetitions."""
        return statistics.median(self.samples)


Stored = list[list[Row]]
"""Rows by run of a benchmark: a file holds one run."""
Source = Callable[[list[Document]], Stored]
Pick = Callable[[Stored], list[Measured]]


@dataclass(frozen=True)
class Target:
    """A figure to reach.

    Attributes:
        name: its key among the reasons for misses.
        what: the figure in words.
        comparison, limit: it is reached where `measured comparison limit` holds.
        source: the stored rows that it is read from, run by run; none where the file is missing.
        pick: the figures out of those rows that all have to reach it; none where they hold none, as in a quick run of a tiny
            shape.
        form: how the figure is written.
    """

    name: str
    what: str
    comparison: Literal[">=", "<="]
    limit: float
    source: Source
    pick: Pick
    form: Callable[[float], str] = formats.number

    @property
    def threshold(self) -> str:
        return f"{self.comparison} {self.form(self.limit)}"

    def reached_by(self, value: float) -> bool:
        return value >= self.limit if self.comparison == ">=" else value <= self.limit

    def decided(self, measured: Measured) -> Answer:
        return decide(measured.runs, self.reached_by)

    def worst(self, found: list[Measured]) -> Measured:
        """The figure that stands for all: one that misses before one that is not decided, then the farthest."""
        order = ("yes", "not decided", "no")
        sign = -1.0 if self.comparison == ">=" else 1.0
        return max(found, key=lambda one: (order.index(self.decided(one)), sign * one.value))


def measured_by(benchmark: str) -> Source:
    """All runs of one subcommand, whole or part by part, measured on a CPU."""
    return lambda documents: [one.rows for one in documents if one.benchmark == benchmark and not one.on_gpu]


def gpu_waves(documents: list[Document]) -> Stored:
    """All waves on a GPU, of the model and the number of clients that the targets are set for."""
    runs = [one.rows for one in documents if one.on_gpu and one.benchmark == "wave"]
    return [[row for row in rows if row["shape"] == GPU_SHAPE and row["clients"] == GPU_CLIENTS] for rows in runs]


def of_waves(shape: str, dtype: str, pick: Callable[[dict[str, Row]], tuple[list[float], str] | None], tokens: int) -> Pick:
    """One figure of waves of this workload: `pick` finds its repetitions, and what it compares with, in rows by system."""

    def picked(runs: Stored) -> list[Measured]:
        found = [one for rows in runs if (one := pick(_wave(rows, shape, dtype, tokens))) is not None]
        return [Measured([samples for samples, _ in found], found[-1][1])] if found else []

    return picked


def ahead_of_peers(shape: str, dtype: str, tokens: int = TOKENS) -> Pick:
    """How many times the best peer's tokens per second ours are."""

    def pick(mine: dict[str, Row]) -> tuple[list[float], str] | None:
        peers = [row for row in mine.values() if row["system"].startswith(PEER_PREFIX)]
        if OURS not in mine or not peers:
            return None
        best = max(peers, key=lambda row: row["tokens_per_s"])
        return run_of(best, "ratio"), f"{best['system']}, {_tokens(best)}"

    return of_waves(shape, dtype, pick, tokens)


def over_floor(shape: str) -> Pick:
    """CPU time of a wave over that of its matrix products alone."""

    def pick(mine: dict[str, Row]) -> tuple[list[float], str] | None:
        row = mine.get(OURS)
        if row is None:
            return None
        return [1.0 / share for share in run_of(row, "floor_share")], f"the wave's matrix products, {_tokens(row)}"

    return of_waves(shape, "float32", pick, TOKENS)


def bitwise_over_fast(shape: str) -> Pick:
    """Time of a wave whose bits do not depend on the topology, over one whose bits may."""

    def pick(mine: dict[str, Row]) -> tuple[list[float], str] | None:
        both = OURS in mine and BITWISE in mine
        return (run_of(mine[BITWISE], "ratio"), f"ours, fast, {_tokens(mine[OURS])}") if both else None

    return of_waves(shape, "float32", pick, TOKENS)


def _wave(rows: list[Row], shape: str, dtype: str, tokens: int) -> dict[str, Row]:
    """Rows by system; results from before there was a choice of the base's numbers are float32."""
    mine = [row for row in rows if row["shape"] == shape and row.get("dtype", "float32") == dtype]
    return {row["system"]: row for row in mine if row["sequences"] * row["length"] == tokens}


def _tokens(row: Row) -> str:
    return f"{row['sequences'] * row['length']} tokens per client and step"


def gpu_share(runs: Stored) -> list[Measured]:
    """FLOP/s of our passes over those of the large products that were measured in the same run; the best workload."""
    mine = [row for rows in runs for row in rows if row["system"] == OURS and row["dtype"] == "bfloat16"]
    best = max(mine, key=lambda row: row["floor_share"], default=None)
    return [] if best is None else [Measured([run_of(best, "floor_share")], f"large bf16 products, {_tokens(best)}")]


_WORKLOAD = ("shape", "system", "figure", "clients", "steps", "sequences", "length")


def of_round(part: str, figure: Callable[[float], float] = float) -> Pick:
    """The figures of one part of the round benchmark that have a target; `figure` is what is compared, from a row's value."""

    def pick(runs: Stored) -> list[Measured]:
        found: dict[tuple[Any, ...], list[Row]] = {}
        for row in (row for rows in runs for row in rows):
            if row["part"] == part and row["target"] is not None and row["shape"] in SHAPES:
                found.setdefault(tuple(row[name] for name in _WORKLOAD), []).append(row)
        return [
            Measured([[figure(v) for v in run_of(row, "value")] for row in rows], _about(rows[-1])) for rows in found.values()
        ]

    return pick


def _about(row: Row) -> str:
    """The workload; beside shares without evaluation, what evaluation takes."""
    about = f"{row['shape']}, {_work(row)}"
    if "shares" in row:
        about += f"; evaluation, left out here, takes {100 * row['shares']['evaluate']:.0f} % of a round"
    return about


def _work(row: Row) -> str:
    return f"{row['system']}, {row['clients']} clients x {row['steps']} steps, {_tokens(row)}"


def ahead_of_flower(shape: str) -> Pick:
    """How many times the rounds per hour of Flower's engine ours are."""

    def pick(runs: Stored) -> list[Measured]:
        found = []
        for rows in runs:
            mine = {row["system"]: row for row in rows if (row["part"], row["shape"]) == (federated.PART, shape)}
            if OURS in mine and federated.FLOWER in mine:
                found.append(mine[federated.FLOWER])
        return [Measured([run_of(row, "ratio") for row in found], _work(found[-1]))] if found else []

    return pick


def bandwidth_share(runs: Stored) -> list[Measured]:
    """Every size and backend."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in (row for rows in runs for row in rows):
        found.setdefault((row["system"], row["shape"]), []).append(row)
    return [Measured([run_of(row, "bandwidth_share") for row in rows], ", ".join(key)) for key, rows in found.items()]
