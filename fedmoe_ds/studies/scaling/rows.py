"""Rows: one per point and repeat, with the figures that need other rows: efficiency.

    efficiency(n) = throughput(n) / throughput(first) / (ranks(n) / ranks(first))

for weak and for strong scaling. Throughput is what all ranks train in a round over seconds: those of training alone, and those
of the whole round, in which the same evaluation is shared by more ranks. It is in tokens per second (in FLOP/s on the axis k,
where a token is not the same work at every value). `first` is the first value of the axis, with the mean of its repeats; where
all values run on the same ranks, efficiency is throughput relative to the first.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fedmoe_ds.config import Config
from fedmoe_ds.studies.ratio import Ratio, ratio_of
from fedmoe_ds.studies.scaling.measured import ALL_TO_ALL, PHASES, Measured
from fedmoe_ds.studies.scaling.study import Study
from fedmoe_ds.studies.spread import Spread

PLACED = {"name", "output", "topology"}
"""Keys that say where a run is and on how many ranks, not what it computes."""
TRAINING, WHOLE = "train_efficiency", "efficiency"
"""Of training alone, and of the whole round."""


@dataclass(frozen=True)
class Row:
    """A finished run of a study. Efficiencies are None where the first value has no finished run, or its throughput no unit."""

    value: int
    label: str
    repeat: int
    config: Config
    measured: Measured
    efficiency: float | None = None
    predicted: float | None = None
    train_efficiency: float | None = None

    def throughput(self, by_flops: bool, training: bool = False) -> float | None:
        """Tokens or FLOPs over the seconds of the whole round, or of training alone."""
        measured = self.measured
        seconds = measured.federated_s if training else measured.seconds
        work = measured.flops if by_flops else measured.tokens
        return None if work is None or seconds <= 0 else work / seconds

    def figures(self) -> dict[str, float | None]:
        """Every figure by its column of scaling.csv; None where it is not known."""
        measured = self.measured
        inside = measured.collectives
        exchanged = None if inside is None else inside.get(ALL_TO_ALL, 0.0)
        return {
            "tokens_per_s": self.throughput(by_flops=False),
            "flops_per_s": self.throughput(by_flops=True),
            "s_per_round": measured.seconds,
            "s_per_round_min": min(measured.round_seconds, default=None),
            "s_per_round_median": statistics.median(measured.round_seconds) if measured.round_seconds else None,
            "s_per_round_max": max(measured.round_seconds, default=None),
            "train_tokens_per_s": self.throughput(by_flops=False, training=True),
            TRAINING: self.train_efficiency,
            WHOLE: self.efficiency,
            **{f"{phase}_s": measured.phases[phase] for phase in (*PHASES, "other")},
            "all_to_all_s": exchanged,
            "other_collectives_s": None if inside is None or exchanged is None else sum(inside.values()) - exchanged,
            "peak_mib": None if measured.peak_mib is None else max(measured.peak_mib),
            "recorded_s": measured.recorded,
            "predicted_s": self.predicted,
            "predicted_over_measured": None if self.predicted is None else self.predicted / measured.recorded,
        }


def with_efficiency(study: Study, rows: Sequence[Row]) -> list[Row]:
    """The same rows with their efficiencies."""
    first = [row for row in rows if row.value == study.values[0]]
    ranks = first[0].measured.ranks if first else 0

    def base(training: bool) -> float | None:
        known = [t for row in first if (t := row.throughput(study.by_flops, training)) is not None]
        # A baseline of some of the repeats would shift the efficiency of all other values.
        return sum(known) / len(known) if known and len(known) == len(first) else None

    bases = {training: base(training) for training in (True, False)}

    def one(row: Row, training: bool) -> float | None:
        own, reference = row.throughput(study.by_flops, training), bases[training]
        # Of a first value that trained nothing there is no multiple.
        return None if not reference or own is None else own / reference / (row.measured.ranks / ranks)

    return [replace(row, efficiency=one(row, False), train_efficiency=one(row, True)) for row in rows]


def efficiency_ratio(study: Study, lines: Sequence[Line], line: Line, training: bool) -> Ratio | None:
    """The efficiency of a value with the interval that its own spread and the first value's leave; None where it is unknown."""
    first = lines[0]
    own, base = line.throughput(study.by_flops, training), first.throughput(study.by_flops, training)
    if own is None or base is None or first.value != study.values[0] or not 0 < base.mean < math.inf or not own.mean > 0:
        return None
    # The first value is what it is compared with: its own spread is no doubt about 100 %.
    return Ratio(1.0) if line is first else ratio_of(own, base, first.measured.ranks / line.measured.ranks)


@dataclass(frozen=True)
class Line:
    """All repeats of a value; a figure that a repeat lacks is absent."""

    value: int
    rows: Sequence[Row]
    figures: Mapping[str, Spread]

    @property
    def measured(self) -> Measured:
        return self.rows[0].measured

    def throughput(self, by_flops: bool, training: bool) -> Spread | None:
        """That of the repeats, where all of them have one."""
        known = {row.repeat: row.throughput(by_flops, training) for row in self.rows}
        found = {repeat: value for repeat, value in known.items() if value is not None}
        return Spread(found) if len(found) == len(known) else None

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
