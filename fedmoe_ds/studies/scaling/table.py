"""Table: the rows of a study as scaling.csv, and the means over repeats as Markdown that reads as plain text too."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence

from fedmoe_ds.report import formats
from fedmoe_ds.report.tables import markdown
from fedmoe_ds.studies.ratio import Ratio
from fedmoe_ds.studies.scaling.measured import PHASES
from fedmoe_ds.studies.scaling.rows import Line, Row, efficiency_ratio
from fedmoe_ds.studies.scaling.study import Study
from fedmoe_ds.studies.spread import with_spread

MISSING = "-"
WORLD = ("ranks", "clusters", "ep_size", "hosts", "cores", "clients")
RUN = ("device", "dtype", "foundation", "method", "seed", "tokens_per_round", "commit", "versions", "nodes")
Form = Callable[[float], str]


def csv_text(study: Study, rows: Sequence[Row]) -> str:
    """One line per point and repeat, all figures in full; an empty cell is a figure that is not known."""
    out = io.StringIO()
    head = ["study", "axis", "value", "repeat", *WORLD, "timed_rounds", *(rows[0].figures() if rows else ()), "digest"]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*head, *RUN])
    for row in rows:
        measured = row.measured
        facts: list[object] = [study.name, study.axis, row.value, row.repeat]
        facts += [getattr(measured, name) for name in WORLD]
        facts += [len(measured.rounds), *(None if v is None else f"{v:.6g}" for v in row.figures().values())]
        writer.writerow(["" if fact is None else fact for fact in [*facts, measured.digest, *_run(row)]])
    return out.getvalue()


def memory_text(study: Study, rows: Sequence[Row]) -> str:
    """One line per point, repeat and rank: how many ranks there are differs from row to row."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["study", "axis", "value", "repeat", "rank", "host", "peak_mib"])
    for row in rows:
        for rank, peak in enumerate(row.measured.peak_mib or ()):
            place = row.measured.ranks_on[rank]
            writer.writerow([study.name, study.axis, row.value, row.repeat, rank, place, f"{peak:.0f}"])
    return out.getvalue()


def _run(row: Row) -> list[object]:
    """What ran where, in the order of `RUN`."""
    config, measured = row.config, row.measured
    versions = "; ".join(f"{name} {version}" for name, version in measured.versions.items())
    what: list[object] = [measured.device, measured.dtype, config.foundation.path or config.foundation.preset]
    what += [config.method.name, config.seed, f"{measured.tokens:.6g}", measured.machine.get("commit"), versions]
    return [*what, " ".join(dict.fromkeys(measured.ranks_on))]


def speed_table(study: Study, lines: Sequence[Line]) -> str:
    """Efficiency and throughput, and what was predicted."""
    facts = [name for name in ("ranks", "clusters", "ep_size", "clients") if name != study.axis]
    unit = [("GFLOP/s", "flops_per_s", lambda v: number(v / 1e9))] if study.by_flops else []
    columns: list[tuple[str, str, Form]] = [
        ("tokens/s", "tokens_per_s", number),
        *unit,
        ("s/round", "s_per_round", seconds),
        ("peak MiB per rank", "peak_mib", lambda v: f"{v:.0f}"),
        ("predicted s", "predicted_s", seconds),
        ("predicted / measured", "predicted_over_measured", lambda v: f"{v:.2f}"),
    ]
    rows = []
    for line in lines:
        measured = line.measured
        cores = MISSING if measured.cores is None else f"{measured.cores}{' (shared)' if line.crowded else ''}"
        place = [str(line.value), *(str(getattr(measured, name)) for name in facts), cores]
        ratios = [_share(efficiency_ratio(study, lines, line, training)) for training in (True, False)]
        rows.append(place + ratios + [_cell(line, figure, form) for _, figure, form in columns])
    head = [study.axis, *facts, "cores", "efficiency of training", "of the whole round"]
    return markdown([*head, *(name for name, _, _ in columns)], rows, text_columns=0)


def time_table(study: Study, lines: Sequence[Line]) -> str:
    """Where the seconds of a round go: phases of rank 0, and how much of them it spent inside collectives."""
    columns = {
        "s/round": "s_per_round",
        **{word: f"s_per_round_{which}" for word, which in (("shortest", "min"), ("median", "median"), ("longest", "max"))},
        **{phase: f"{phase}_s" for phase in (*PHASES, "other")},
        "in all-to-all": "all_to_all_s",
        "in other collectives": "other_collectives_s",
    }
    rows = [[str(line.value), *(_cell(line, figure, seconds) for figure in columns.values())] for line in lines]
    return markdown([study.axis, *columns], rows, text_columns=0)


def _cell(line: Line, figure: str, form: Form) -> str:
    spread = line.figures.get(figure)
    if spread is None:
        return MISSING
    return form(spread.mean) if spread.std == 0 else with_spread(spread, form)  # a prediction has no spread


def _share(ratio: Ratio | None) -> str:
    """88 % (83 to 93); without an interval where a spread is not known."""
    if ratio is None:
        return MISSING
    bounds = "" if ratio.low is None or ratio.high is None else f" ({100 * ratio.low:.0f} to {100 * ratio.high:.0f})"
    return f"{100 * ratio.value:.0f} %{bounds}"


def seconds(value: float) -> str:
    """Milliseconds and no finer."""
    return f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def number(value: float) -> str:
    """Three significant digits, all digits before the point."""
    return formats.number(value).replace(formats.NARROW_SPACE, "")
