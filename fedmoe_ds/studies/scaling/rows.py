"""Rows: one per point and repeat, with the figures that need other rows: efficiency.

    efficiency(n) = throughput(n) / throughput(first) / (ranks(n) / ranks(first))

for weak and for strong scaling. Throughput is what all ranks train in a round over the wall-clock seconds of the round, in
tokens per second (in FLOP/s on the axis k, where a token is not the same work at every value). `first` is the first value of
the axis, with the mean of its repeats; where all values run on the same ranks, efficiency is throughput relative to the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedmoe_ds.config import Config
from fedmoe_ds.studies.scaling.measured import ALL_TO_ALL, PHASES, Measured
from fedmoe_ds.studies.scaling.study import Study
from fedmoe_ds.studies.spread import Spread

PLACED = {"name", "output", "topology"}
"""Keys that say where a run is and on how many ranks, not what it computes."""


@dataclass(frozen=True)
class Row:
    """A finished run of a study. `efficiency` is None where the first value has no finished run, or its throughput no unit."""

    value: int
    label: str
    repeat: int
    config: Config
    measured: Measured
    efficiency: float | None = None
    predicted: float | None = None

    def throughput(self, by_flops: bool) -> float | None:
        return self.measured.flops_per_s if by_flops else self.measured.tokens_per_s

    def figures(self) -> dict[str, float | None]:
        """Every figure by its column of scaling.csv; None where it is not known."""
        measured = self.measured
        inside = measured.collectives
        exchanged = None if inside is None else inside.get(ALL_TO_ALL, 0.0)
        return {
            "tokens_per_s": measured.tokens_per_s,
            "flops_per_s": measured.flops_per_s,
            "s_per_round": measured.seconds,
            "efficiency": self.efficiency,
            **{f"{phase}_s": measured.phases[phase] for phase in (*PHASES, "other")},
            "all_to_all_s": exchanged,
            "other_collectives_s": None if inside is None or exchanged is None else sum(inside.values()) - exchanged,
            "peak_mib": None if measured.peak_mib is None else max(measured.peak_mib),
            "recorded_s": measured.recorded,
            "predicted_s": self.predicted,
            "predicted_over_measured": None if self.predicted is None else self.predicted / measured.recorded,
        }


def with_efficiency(study: Study, rows: Sequence[Row]) -> list[Row]:
    """The same rows with their efficiency."""
    first = [row for row in rows if row.value == study.values[0]]
    known = [t for row in first if (t := row.throughput(study.by_flops)) is not None]
    # A baseline of some of the repeats would shift the efficiency of all other values.
    base = sum(known) / len(known) if known and len(known) == len(first) else None
    ranks = first[0].measured.ranks if first else 0

    def one(row: Row) -> Row:
        own = row.throughput(study.by_flops)
        value = None if base is None or own is None else own / base / (row.measured.ranks / ranks)
        return Row(row.value, row.label, row.repeat, row.config, row.measured, value, row.predicted)

    return [one(row) for row in rows]


@dataclass(frozen=True)
class Line:
    """All repeats of a value; a figure that a repeat lacks is absent."""

    value: int
    rows: Sequence[Row]
    figures: Mapping[str, Spread]

    @property
    def measured(self) -> Measured:
        return self.rows[0].measured

    @property
    def crowded(self) -> bool:
        """Whether ranks had to share cores."""
        return self.measured.cores is not None and self.measured.cores < self.measured.ranks


def lines_of(rows: Sequence[Row]) -> list[Line]:
    """One line per value that has a finished run, in the order of the axis."""
    lines = []
    for value in sorted({row.value for row in rows}):
        mine = [row for row in rows if row.value == value]
        by_repeat = {row.repeat: row.figures() for row in mine}
        names = next(iter(by_repeat.values()))
        spreads = {}
        for name in names:
            known = {repeat: figure for repeat, figures in by_repeat.items() if (figure := figures[name]) is not None}
            # A mean over some of the repeats would stand beside means over all of them.
            if len(known) == len(mine):
                spreads[name] = Spread(known)
        lines.append(Line(value, mine, spreads))
    return lines


def differing(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Pairs of runs that trained the same federation bitwise and yet learnt something else: there must be none."""
    first: dict[str, Row] = {}
    pairs = []
    for row in rows:
        # Without bitwise reproducibility digests may differ and nothing is wrong.
        if row.measured.bitwise:
            reference = first.setdefault(_federation(row), row)
            if reference.measured.digest != row.measured.digest:
                pairs.append((reference, row))
    return pairs


def same_everywhere(rows: Sequence[Row]) -> bool:
    """Whether all values of the axis train one and the same federation, bit for bit comparable."""
    return len(rows) > 1 and all(row.measured.bitwise for row in rows) and len({_federation(row) for row in rows}) == 1


def _federation(row: Row) -> str:
    return row.config.model_dump_json(exclude=PLACED)
