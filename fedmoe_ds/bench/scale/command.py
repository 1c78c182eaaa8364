"""`launch/bench.py scale`: costs of one process as ranks, clients or parameters grow, so that a wall is seen before it is met.

Every point is measured once, in a process of its own with a limit. A point that fails, takes too long or needs too much memory
is a line with its reason, ends its curve, and makes the exit code 1.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fedmoe_ds.bench.harness.checks import check_known, check_least
from fedmoe_ds.bench.harness.command import Command, Note, option
from fedmoe_ds.bench.harness.process import module_command, run_to_end, scratch_folder
from fedmoe_ds.bench.harness.repeats import make_row
from fedmoe_ds.bench.harness.system import OURS
from fedmoe_ds.bench.harness.table import Row, Table, whole
from fedmoe_ds.bench.scale.curve import SECONDS, Curve, curve_names, growth, load_curve
from fedmoe_ds.storage.strict_json import read_json

_PEAK = "peak_mib"
OPTIONS = (
    option("--curves", None, "the curves to measure (default: all)", nargs="+"),
    option("--most", None, "no point beyond this x", type=int),
    option("--limit", 120, "seconds that a point may take, the start of its process included"),
    option("--mib", 4096, "MiB that a point may need at its peak"),
)
ABOUT = (
    "Costs of one process as ranks, clients or parameters grow; synthetic, no ranks are started. Growth is the factor per "
    "doubling of x: 1 constant, 2 linear, 4 quadratic. Every point is one measurement in a process of its own."
)


def run(args: argparse.Namespace, note: Note) -> list[Row]:
    """Raises UserError for a curve that there is not, and limits that leave nothing to measure."""
    names = curve_names()
    check_known("--curves", "curve", args.curves or [], names)
    for name in ("limit", "mib", *(["most"] if args.most is not None else [])):
        check_least(f"--{name}", getattr(args, name))
    rows: list[Row] = []
    for name in dict.fromkeys(args.curves or names):
        try:
            curve = load_curve(name)
        except Exception as error:
            # Whatever it is: a broken curve is a line of the result, and the others are measured.
            rows.append(_row(name, "", "", 0, failed=f"cannot be loaded: {error}"))
            continue
        rows += _points(curve, args, note)
    return rows


def _points(curve: Curve, args: argparse.Namespace, note: Note) -> list[Row]:
    rows: list[Row] = []
    points = [x for x in curve.points if args.most is None or x <= args.most]
    for x in points:
        note(f"{curve.name}: {x:,} {curve.x}")
        row = _measured(curve, x, args.limit, args.mib)
        if rows and row["failed"] is None:
            row["growth"] = growth((rows[-1]["x"], rows[-1][SECONDS]), (x, row[SECONDS]))
        rows.append(row)
        if row["failed"] is not None:
            # Larger ones would fail as well, and take longer.
            return rows
    # Nothing measured must not read like a curve that holds.
    return rows or [_row(curve.name, curve.x, curve.wall, 0, failed=f"no point up to --most {args.most}")]


def _measured(curve: Curve, x: int, limit_s: float, most_mib: float) -> Row:
    with scratch_folder() as folder:
        file = folder / "figures.json"
        command = module_command("fedmoe_ds.bench.scale.point", curve.name, str(x), str(file))
        try:
            run_to_end(f"{curve.name} at {x:,} {curve.x}", command, limit_s)
            figures = _figures(file)
        except (RuntimeError, OSError, ValueError) as error:
            return _row(curve.name, curve.x, curve.wall, x, failed=_reason(error))
    peak = figures.pop(_PEAK)
    over = f"{peak:,.0f} MiB at its peak, more than --mib {most_mib}" if peak > most_mib else None
    return _row(curve.name, curve.x, curve.wall, x, figures, peak, over)


def _figures(file: Path) -> dict[str, float]:
    found: dict[str, float] = read_json(file)
    return found


def _reason(error: Exception) -> str:
    """Its last line, which is the message of a traceback; the first line says what ended and how."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if len(lines) < 2 else f"{lines[0].rstrip(':')}: {lines[-1]}"


def _row(
    name: str,
    unit: str,
    wall: str,
    x: int,
    figures: dict[str, float] | None = None,
    peak: float | None = None,
    failed: str | None = None,
) -> Row:
    others = dict(figures or {})
    facts = {"curve": name, "x": x, "unit": unit, "wall": wall, SECONDS: others.pop(SECONDS, None), "growth": None}
    return make_row(name, OURS, peak, None, **facts, failed=failed, figures=others)


def _table(rows: list[Row]) -> Table:
    """One block of lines per curve, the walls below."""
    header = ["curve", "x", SECONDS, "growth", "peak MiB", "figures"]
    cells, walls = list[list[str]](), dict[str, str]()
    for row in rows:
        first = row["curve"] not in walls
        walls.setdefault(row["curve"], row["wall"])
        told = "; ".join(f"{key} {_short(value)}" for key, value in row["figures"].items())
        told = "; ".join(part for part in (told, row["failed"] and f"FAILED: {row['failed']}") if part)
        seconds, growing = row[SECONDS], row["growth"]
        cells.append([
            f"{row['curve']} ({row['unit']})" if first else "",
            f"{row['x']:,}",
            "" if seconds is None else _short(seconds),
            "" if growing is None else f"{growing:.2f}",
            whole(row[_PEAK]),
            told,
        ])  # fmt: skip
    return Table(header, cells, [f"{name}: {wall}" for name, wall in walls.items() if wall], words=("curve", "figures"))


def _short(value: float) -> str:
    """Three digits, and whole numbers as such."""
    return f"{value:,.0f}" if value.is_integer() or abs(value) >= 1000 else f"{value:.3g}"


def _code(rows: list[Row]) -> int:
    return int(any(row["failed"] is not None for row in rows))


HELP = "the walls of scale: costs of one process as ranks, clients or parameters grow"
COMMAND = Command("scale", HELP, OPTIONS, run, table=_table, about=ABOUT, code=_code)
