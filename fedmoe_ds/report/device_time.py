"""Device time: when, and at what cost, a run on simulated devices has come how far; the section of the report page about it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from fedmoe_ds.report import formats
from fedmoe_ds.report.history import Event, History
from fedmoe_ds.report.markup import Markup, table, tag
from fedmoe_ds.report.svg import Series, line_chart, tier_colours, tier_mark

LADDER = (0.5, 0.75, 0.9, 1.0)
"""Shares of what a run has won in perplexity, where it names no target."""
_UNITS = (("days", 86_400.0), ("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0), ("ms", 1e-3))
_JOULES = (("MJ", 1e6), ("kJ", 1e3), ("J", 1.0), ("mJ", 1e-3))
SPLIT = "global"


def on_global(history: History, tier: str) -> list[Event]:
    """Evaluations of a tier's model on the global hold-out, in order of rounds."""
    return [row for (_, split, name), row in sorted(history.evaluations.items()) if (split, name) == (SPLIT, tier)]


def scored(history: History, tier: str) -> list[Event]:
    """Those of them that say virtual time."""
    rows = on_global(history, tier)
    return [row for row in rows if row.get("virtual_time") is not None and row.get("joules_total") is not None]


def reached(rows: Iterable[Event], metric: str, target: float) -> Event | None:
    """The first evaluation whose perplexity is not above a target, or whose accuracy is not below it."""
    for row in rows:
        value = row.get(metric)
        if value is not None and math.isfinite(value) and (value <= target if metric == "perplexity" else value >= target):
            return row
    return None


def targets(history: History, rows: Sequence[Event]) -> list[tuple[str, float]]:
    """(metric, value) of what is looked for: what the run names, else steps from where it began to its best perplexity."""
    told = history.run.get("devices") or {}
    named = [(metric, told.get(f"target_{metric}")) for metric in ("perplexity", "accuracy")]
    if found := [(metric, float(value)) for metric, value in named if value is not None]:
        return found
    known = [value for row in rows if (value := row.get("perplexity")) is not None and math.isfinite(value)]
    if not known or min(known) >= known[0]:
        return []
    return [("perplexity", known[0] - share * (known[0] - min(known))) for share in LADDER]


def energy(joules: float | None) -> str:
    """Joules with a unit that needs few digits."""
    if joules is None or not math.isfinite(joules):
        return formats.MISSING
    unit, scale = next(((unit, scale) for unit, scale in _JOULES if joules >= scale), _JOULES[-1])
    return f"{formats.number(joules / scale)}{formats.NARROW_SPACE}{unit}"


def span(seconds: float | None) -> str:
    """Virtual time with a unit that needs few digits; devices may take milliseconds or months."""
    if seconds is None or not math.isfinite(seconds):
        return formats.MISSING
    unit, scale = next(((unit, scale) for unit, scale in _UNITS if seconds >= scale), _UNITS[-1])
    return f"{formats.number(seconds / scale)}{formats.NARROW_SPACE}{unit}"


def device_section(history: History) -> Markup | None:
    """Virtual time and energy of a run on simulated devices; None of any other."""
    rounds = [event for _, event in sorted(history.rounds.items()) if event.get("virtual_time") is not None]
    if not rounds:
        return None
    return tag(
        "div",
        tag("p", _lead(history, rounds), cls="lead"),
        tag("div", *(tag("figure", chart) for chart in _charts(history)), cls="pair"),
        tag("h3", "Time and energy to a target"),
        tag("div", _target_table(history), cls="scroll"),
        _round_table(rounds),
    )


def _lead(history: History, rounds: Sequence[Event]) -> str:
    told, last = history.run.get("devices") or {}, rounds[-1]
    counts = ", ".join(f"{count} {name}" for name, count in list((told.get("profiles") or {}).items())[:8])
    missed = {why: sum(event.get(why) or 0 for event in rounds) for why in ("late", "lost", "stale")}
    vain = ", ".join(f"{count} {why}" for why, count in missed.items() if count)
    sent = [sum(event.get(key) or 0 for event in rounds) for key in ("down_bytes", "up_bytes")]
    return (
        f"Simulated devices{f' ({counts})' if counts else ''}, {told.get('aggregation') or 'synchronous'}: "
        f"{span(last.get('virtual_time'))} and {energy(last.get('joules_total'))} in {formats.many(len(rounds), 'round')}; "
        f"{formats.count(sent[0])} bytes down, {formats.count(sent[1])} up. "
        f"Updates that were not taken: {vain or 'none'}; their time and energy count."
    )


def _charts(history: History) -> list[Markup]:
    """Perplexity over virtual time, and over energy: a line per tier."""
    lines = {tier: rows for tier in history.tiers if (rows := scored(history, tier))}
    return [
        _chart(history, lines, "virtual_time", "Perplexity over virtual time (log scale)", _UNITS, span),
        _chart(history, lines, "joules_total", "Perplexity over energy (log scale)", _JOULES, energy),
    ]


def _chart(
    history: History,
    lines: dict[str, list[Event]],
    key: str,
    title: str,
    units: Sequence[tuple[str, float]],
    form: Callable[[float | None], str],
) -> Markup:
    most = max((row[key] for rows in lines.values() for row in rows), default=0.0)
    # The charts' x is a whole number: the largest unit of which there are so many that rounding is not seen.
    unit, scale = next(((unit, scale) for unit, scale in units if most >= 200 * scale), units[-1])
    colours = tier_colours(history.tiers)
    series = [
        Series(
            colours[tier],
            f"k={tier}",
            [(round(row[key] / scale), row.get("perplexity")) for row in rows],
            [f"round {row['round']}, {form(row[key])}\nperplexity {formats.number(row.get('perplexity'))}" for row in rows],
        )
        for tier, rows in lines.items()
    ]
    return line_chart(series, title=title, x_label=unit, form=lambda y: formats.number(y), log=True)


def _target_table(history: History) -> Markup:
    colours, rows = tier_colours(history.tiers), []
    for tier in history.tiers:
        found = scored(history, tier)
        for metric, target in targets(history, found):
            row = reached(found, metric, target)
            goal = formats.number(target) if metric == "perplexity" else formats.percent(target)
            cells = [formats.MISSING] * 3
            if row is not None:
                cells = [str(row["round"]), span(row["virtual_time"]), energy(row["joules_total"])]
            rows.append([tag("td", tier_mark(colours[tier], tier)), f"{metric} {goal}", *cells])
    return table(["tier", "target", "first in round", "virtual time", "energy"], rows, text_columns=2)


def _round_table(rounds: Sequence[Event]) -> Markup:
    head = ["round", "virtual time", "so far", "energy", "so far", "late", "lost", "stale", "mean delay"]
    rows = [
        [
            str(event["round"]),
            span(event.get("virtual_s")),
            span(event.get("virtual_time")),
            energy(event.get("joules")),
            energy(event.get("joules_total")),
            *(formats.count(event.get(why)) for why in ("late", "lost", "stale")),
            formats.number(event.get("mean_delay")),
        ]
        for event in rounds[-500:]
    ]
    body = tag("div", table(head, rows), cls="scroll")
    return tag("details", tag("summary", "Every round on the devices"), body)
