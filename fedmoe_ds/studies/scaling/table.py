"""Table: the rows of a study as scaling.csv, and the means over repeats as Markdown that reads as plain text too."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence

from fedmoe_ds.report import formats
from fedmoe_ds.report.tables import markdown
from fedmoe_ds.studies.scaling.rows import Line, Row
from fedmoe_ds.studies.scaling.study import Study
from fedmoe_ds.studies.spread import with_spread

MISSING = "-"
WORLD = ("ranks", "clusters", "ep_size", "hosts", "cores", "clients")
Form = Callable[[float], str]


def csv_text(study: Study, rows: Sequence[Row]) -> str:
    """One line per point and repeat, all figures in full; an empty cell is a figure that is not known."""
    out = io.StringIO()
    head = ["study", "axis", "value", "repeat", *WORLD, "timed_rounds", *(rows[0].figures() if rows else ()), "digest"]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*head, "peak_mib_by_rank"])
    for row in rows:
        measured = row.measured
        facts: list[object] = [study.name, study.axis, row.value, row.repeat]
        facts += [getattr(measured, name) for name in WORLD]
        facts += [len(measured.rounds), *(None if v is None else f"{v:.6g}" for v in row.figures().values())]
        # All ranks in one cell: their number differs from row to row.
        peaks = " ".join(f"{peak:.0f}" for peak in measured.peak_mib or ())
        writer.writerow(["" if fact is None else fact for fact in [*facts, measured.digest, peaks]])
    return out.getvalue()


def speed_table(study: Study, lines: Sequence[Line]) -> str:
    """Throughput and efficiency, and what was predicted."""
    facts = [name for name in ("ranks", "clusters", "ep_size", "clients") if name != study.axis]
    unit = [("GFLOP/s", "flops_per_s", lambda v: number(v / 1e9))] if study.by_flops else []
    columns: list[tuple[str, str, Form]] = [
        ("tokens/s", "tokens_per_s", number),
        *unit,
        ("s/round", "s_per_round", seconds),
        ("efficiency", "efficiency", lambda v: f"{100 * v:.0f} %"),
        ("peak MiB per rank", "peak_mib", lambda v: f"{v:.0f}"),
        ("predicted s", "predicted_s", seconds),
        ("predicted / measured", "predicted_over_measured", lambda v: f"{v:.2f}"),
    ]
    rows = []
    for line in lines:
        measured = line.measured
        cores = MISSING if measured.cores is None else f"{measured.cores}{' (shared)' if line.crowded else ''}"
        place = [str(line.value), *(str(getattr(measured, name)) for name in facts), cores]
        rows.append(place + [_cell(line, figure, form) for _, figure, form in columns])
    return markdown([study.axis, *facts, "cores", *(name for name, _, _ in columns)], rows, text_columns=0)


def time_table(study: Study, lines: Sequence[Line]) -> str:
    """Where the seconds of a round go: phases of rank 0, and how much of them it spent inside collectives."""
    figures = ("s_per_round", "train_s", "aggregate_s", "evaluate_s", "other_s", "all_to_all_s", "other_collectives_s")
    head = [study.axis, "s/round", "train", "aggregate", "evaluate", "other", "in all-to-all", "in other collectives"]
    rows = [[str(line.value), *(_cell(line, figure, seconds) for figure in figures)] for line in lines]
    return markdown(head, rows, text_columns=0)


def _cell(line: Line, figure: str, form: Form) -> str:
    spread = line.figures.get(figure)
    if spread is None:
        return MISSING
    return form(spread.mean) if spread.std == 0 else with_spread(spread, form)  # a prediction has no spread


def seconds(value: float) -> str:
    """Milliseconds and no finer."""
    return f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def number(value: float) -> str:
    """Three significant digits, all digits before the point."""
    return formats.number(value).replace(formats.NARROW_SPACE, "")
