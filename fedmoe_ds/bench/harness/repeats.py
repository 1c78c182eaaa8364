"""Repeats: a figure with all its repetitions: how it is written, and when it decides whether a target is reached.

Rows of results keep the repetitions of a figure in `samples`, by the figure's name. Systems take turns, so ratios are formed
within a turn: what disturbs the machine for a minute disturbs both sides.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from scipy import stats  # type: ignore[import-untyped]

from fedmoe_ds.bench.harness.table import Row, Table
from fedmoe_ds.machine import machine_facts

CONFIDENCE = 0.95
UNKNOWN = " †"
UNKNOWN_MEANS = f"{UNKNOWN.strip()} the median of repetitions that were not stored: its spread is not known"
ONCE = "(one timing)"

Answer = Literal["yes", "no", "not decided"]
Form = Callable[[float], str]
Runs = Sequence[Sequence[float]]
"""The repetitions of a figure, run by run of a benchmark."""


def make_row(
    shape: str, system: str, peak_mib: float | None, samples: Mapping[str, Sequence[float]] | None = None, **facts: Any
) -> Row:
    """A row with the figures that every row has, the medians of the repeated ones, more facts, and the machine."""
    row: Row = {"shape": shape, "system": system, "tokens_per_s": None, "peak_mib": peak_mib, "floor_share": None}
    if samples is not None:
        row |= {**{name: statistics.median(found) for name, found in samples.items()}, "samples": samples}
    return {**row, **facts, **machine_facts()}


def paired(left: Sequence[float], right: Sequence[float]) -> list[float]:
    """Ratios by turn; one ratio of medians where a side was timed once or the turns do not match."""
    if len(left) == len(right):
        return [a / b for a, b in zip(left, right, strict=True)]
    return [statistics.median(left) / statistics.median(right)]


def samples_of(row: Row, name: str) -> list[float] | None:
    """The repetitions of a row's figure; None where they were not stored."""
    found = row.get("samples", {}).get(name)
    return None if not found else [float(value) for value in found]


def run_of(row: Row, name: str) -> list[float]:
    """As `samples_of`; a figure without repetitions counts as one."""
    return samples_of(row, name) or [float(row[name])]


def shown(row: Row, name: str, form: Form) -> str:
    """Median and range, `3.76 (3.70 to 3.81)`; says where there is a single timing, or where the spread is not known."""
    if row[name] is None:
        return ""
    samples = samples_of(row, name)
    return f"{form(row[name])}{UNKNOWN}" if samples is None else with_range(samples, form)


def with_range(samples: Sequence[float], form: Form) -> str:
    """Median and range of repetitions."""
    if len(samples) == 1:
        return f"{form(samples[0])} {ONCE}"
    low, high = min(samples), max(samples)
    middle = form(statistics.median(samples))
    return middle if low == high else f"{middle} ({form(low)} to {form(high)})"


def with_notes(table: Table) -> Table:
    """The table with what its marks mean."""
    marked = any(UNKNOWN in cell for line in table.cells for cell in line)
    return Table(table.header, table.cells, [*table.lines, *([UNKNOWN_MEANS] if marked else [])], table.words)


def interval(samples: Sequence[float]) -> tuple[float, float]:
    """The t-interval of the mean at `CONFIDENCE`; all numbers where there is one repetition."""
    if len(samples) < 2:
        return -math.inf, math.inf
    middle, error = statistics.fmean(samples), statistics.stdev(samples) / math.sqrt(len(samples))
    reach = float(stats.t.ppf((1.0 + CONFIDENCE) / 2.0, len(samples) - 1)) * error
    return middle - reach, middle + reach


def decide(runs: Runs, reached: Callable[[float], bool]) -> Answer:
    """Whether a target is reached: `yes` or `no` where everything lies on one side of it.

    Everything is the interval over all repetitions, and the median of every run: repetitions of one run share its day, so many
    of them in one run do not outvote another run.
    """
    sides = {reached(value) for value in interval([value for run in runs for value in run])}
    sides |= {reached(statistics.median(run)) for run in runs}
    return "not decided" if len(sides) > 1 else "yes" if True in sides else "no"
