"""Targets: what the project wants to reach in speed, and where each figure stands in the stored results.

Ratios compare systems that were measured in one run, one thread per rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from fedmoe_ds.bench import federated
from fedmoe_ds.bench.document import Document
from fedmoe_ds.bench.system import BITWISE, OURS, PEER_PREFIX
from fedmoe_ds.bench.table import Row
from fedmoe_ds.report import formats

SHAPES = ("e32", "e64")
"""The shapes that targets are set for on a CPU; a result of another one, as of a quick run, reaches nothing."""
GPU_SHAPE = "olmoe-7b"
GPU_CLIENTS = 8


@dataclass(frozen=True)
class Measured:
    """A figure, and the peer or reference that it compares with."""

    value: float
    against: str


Source = Callable[[list[Document]], list[Row]]
Pick = Callable[[list[Row]], Measured | None]
Worst = Callable[..., Any]


@dataclass(frozen=True)
class Target:
    """A figure to reach.

    Attributes:
        name: its key among the reasons for misses.
        what: the figure in words.
        comparison, limit: it is reached where `measured comparison limit` holds.
        source: the stored rows that it is read from; none where the file is missing.
        pick: the figure out of those rows; None where they do not hold it, as in a quick run of a tiny shape.
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


def stored_in(name: str) -> Source:
    """The rows of one file, measured on a CPU."""
    return lambda documents: [row for one in documents if one.name == name and not one.on_gpu for row in one.rows]


def measured_by(benchmark: str) -> Source:
    """The rows of all files of one subcommand, which may have run part by part, measured on a CPU."""
    return lambda documents: [row for one in documents if one.benchmark == benchmark and not one.on_gpu for row in one.rows]


def gpu_waves(documents: list[Document]) -> list[Row]:
    """The rows of all waves on a GPU, of the model and the number of clients that the targets are set for."""
    rows = [row for one in documents if one.on_gpu and one.benchmark == "wave" for row in one.rows]
    return [row for row in rows if row["shape"] == GPU_SHAPE and row["clients"] == GPU_CLIENTS]


def ahead_of_peers(shape: str, dtype: str, prefix: str = PEER_PREFIX) -> Pick:
    """How many times the best peer's tokens per second ours are."""

    def pick(rows: list[Row]) -> Measured | None:
        mine = _wave(rows, shape, dtype)
        peers = [row for row in mine.values() if row["system"].startswith(prefix)]
        if OURS not in mine or not peers:
            return None
        best = max(peers, key=lambda row: row["tokens_per_s"])
        return Measured(mine[OURS]["tokens_per_s"] / best["tokens_per_s"], f"{best['system']}, {_tokens(best)}")

    return pick


def over_floor(shape: str) -> Pick:
    """CPU time of a wave over that of its matrix products alone."""

    def pick(rows: list[Row]) -> Measured | None:
        row = _wave(rows, shape, "float32").get(OURS)
        return None if row is None else Measured(1.0 / row["floor_share"], f"the wave's matrix products, {_tokens(row)}")

    return pick


def bitwise_over_fast(shape: str) -> Pick:
    """Time of a wave whose bits do not depend on the topology, over one whose bits may."""

    def pick(rows: list[Row]) -> Measured | None:
        mine = _wave(rows, shape, "float32")
        if OURS not in mine or BITWISE not in mine:
            return None
        return Measured(mine[OURS]["tokens_per_s"] / mine[BITWISE]["tokens_per_s"], f"ours, fast, {_tokens(mine[OURS])}")

    return pick


def _wave(rows: list[Row], shape: str, dtype: str) -> dict[str, Row]:
    """Rows by system; results from before there was a choice of the base's numbers are float32."""
    return {row["system"]: row for row in rows if row["shape"] == shape and row.get("dtype", "float32") == dtype}


def _tokens(row: Row) -> str:
    return f"{row['sequences'] * row['length']} tokens per client and step"


def gpu_ahead_of_peers(tokens: int) -> Pick:
    """As `ahead_of_peers`, at this many tokens per client and step."""

    def pick(rows: list[Row]) -> Measured | None:
        return ahead_of_peers(GPU_SHAPE, "bfloat16")([row for row in rows if row["sequences"] * row["length"] == tokens])

    return pick


def gpu_share(rows: list[Row]) -> Measured | None:
    """FLOP/s of our passes over those of the large products that were measured in the same run; the best workload."""
    mine = [row for row in rows if row["system"] == OURS and row["dtype"] == "bfloat16"]
    best = max(mine, key=lambda row: row["floor_share"], default=None)
    return None if best is None else Measured(best["floor_share"], f"large bf16 products, {_tokens(best)}")


def worst_of_round(part: str, worst: Worst = max, figure: Callable[[float], float] = float) -> Pick:
    """The worst figure among those of one part of the round benchmark that have a target.

    Args:
        part: as its rows call it.
        worst: max where less is better.
        figure: what is compared and shown, from a row's value.
    """

    def pick(rows: list[Row]) -> Measured | None:
        mine = [row for row in rows if row["part"] == part and row["target"] is not None and row["shape"] in SHAPES]
        row = worst(mine, key=lambda row: figure(row["value"]), default=None)
        return None if row is None else Measured(figure(row["value"]), f"{row['shape']}, {_work(row)}")

    return pick


def _work(row: Row) -> str:
    return f"{row['system']}, {row['clients']} clients x {row['steps']} steps, {_tokens(row)}"


def ahead_of_flower(shape: str) -> Pick:
    """How many times the rounds per hour of Flower's engine ours are."""

    def pick(rows: list[Row]) -> Measured | None:
        mine = {row["system"]: row for row in rows if (row["part"], row["shape"]) == (federated.PART, shape)}
        if OURS not in mine or federated.FLOWER not in mine:
            return None
        theirs = mine[federated.FLOWER]
        return Measured(mine[OURS]["rounds_per_hour"] / theirs["rounds_per_hour"], _work(theirs))

    return pick


def smallest_bandwidth_share(rows: list[Row]) -> Measured | None:
    """The worst of all sizes and backends."""
    row = min(rows, key=lambda row: row["bandwidth_share"], default=None)
    return None if row is None else Measured(row["bandwidth_share"], f"{row['system']}, {row['shape']}")
