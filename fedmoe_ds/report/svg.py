"""Charts as inline SVG: lines, stacked columns, dense columns. Colours come from CSS, so both colour schemes work."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from fedmoe_ds.report import formats
from fedmoe_ds.report.axis import LARGEST, LEAST, Axis, whole_ticks
from fedmoe_ds.report.markup import Markup, join, tag

WIDTH, HEIGHT = 480.0, 290.0
LEFT, RIGHT, TOP, BOTTOM = 50.0, 52.0, 28.0, 42.0
LABEL_GAP = 15.0
MARKERS = ("circle", "square", "diamond", "triangle")
MOST_POINTS = 400
"""More than this a chart of this width cannot show."""
T = TypeVar("T")


def thinned(items: Sequence[T], most: int = MOST_POINTS) -> list[T]:
    """At most `most` of them, evenly spaced, the first and the last included."""
    if len(items) <= most:
        return list(items)
    step = (len(items) - 1) / (most - 1)
    # Rounded places from first to last: a slice with a step would drop the last point, the one people look for.
    return [items[round(index * step)] for index in range(most)]


def shown_of(size: int, noun: str, most: int = MOST_POINTS) -> str:
    """What is to be said where not all are shown; empty where all are."""
    return "" if size <= most else f" ({most} of {formats.many(size, noun)})"


@dataclass(frozen=True)
class Series:
    """One line: its colour class, its label at the right end, points (x, y or None) and a tooltip per point."""

    css: str
    label: str
    points: Sequence[tuple[int, float | None]]
    tips: Sequence[str]


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    form: Callable[[float], str],
    log: bool = False,
    zero: bool = False,
    most: float = LARGEST,
) -> Markup:
    """Lines over whole-numbered x with labels at their right ends.

    Values that are missing, not finite, or on a logarithmic axis not positive leave a gap. `zero` starts y at 0; no y is larger
    than `most`. Of a line with more than `MOST_POINTS` points, evenly spaced ones are drawn, and the title says so.
    """
    # Before thinning: the title tells how many there were.
    longest = max((len(line.points) for line in series), default=0)
    title += shown_of(longest, x_label)
    series = [replace(line, points=thinned(line.points), tips=thinned(line.tips)) for line in series]
    # Axes come from what is drawn: one infinite loss must not flatten the rest.
    usable = [point for line in series for point in _usable(line, log)]
    if not usable:
        return tag("p", f"{title}: nothing to draw.", cls="empty")
    first, last = min(x for x, _ in usable), max(x for x, _ in usable)
    # A single round has no width; half a round on either side puts it in the middle.
    x_axis = Axis(float(first), float(last)) if last > first else Axis(first - 0.5, last + 0.5)
    y_axis = Axis.around([y for _, y in usable], log=log, zero=zero, most=most)

    def at(x: float, y: float) -> tuple[float, float]:
        return x_axis.place(x, LEFT + 8, WIDTH - RIGHT - 8), y_axis.place(y, HEIGHT - BOTTOM, TOP)

    lines = [_line(line, MARKERS[number % len(MARKERS)], at, log) for number, line in enumerate(series)]
    ends = [(line, at(*_usable(line, log)[-1])) for line in series if _usable(line, log)]
    x_ticks = [(at(x, y_axis.low)[0], str(x)) for x in whole_ticks(first, last)]
    y_ticks = [(at(x_axis.low, y)[1], form(y)) for y in y_axis.ticks()]
    return _frame(title, x_label, x_ticks, y_ticks, [*lines, *_end_labels(ends)])


def _usable(line: Series, log: bool) -> list[tuple[int, float]]:
    return [(x, y) for x, y in line.points if y is not None and _is_drawn(y, log)]


def _is_drawn(y: float, log: bool) -> bool:
    return math.isfinite(y) and (y >= LEAST or not log)


def _line(line: Series, marker: str, at: Callable[[float, float], tuple[float, float]], log: bool) -> Markup:
    path, pen_down, dots = "", False, []
    # More markers would run into each other and hide the line.
    sparse = len(line.points) <= 40
    for (x, y), tip in zip(line.points, line.tips, strict=True):
        if y is None or not _is_drawn(y, log):
            pen_down = False
            continue
        across, down = at(x, y)
        path += f"{'L' if pen_down else 'M'}{across:.1f} {down:.1f}"
        pen_down = True
        dots.append(_marker(marker, across, down) if sparse else None)
        # An invisible circle, larger than the marker: a tooltip needs something to hit.
        dots.append(tag("circle", cx=f"{across:.1f}", cy=f"{down:.1f}", r=9, cls="hit", data_t=tip))
    return tag("g", tag("path", d=path, cls="line"), *dots, cls=line.css)


def _marker(kind: str, x: float, y: float) -> Markup:
    corners = {
        "square": [(-3.4, -3.4), (3.4, -3.4), (3.4, 3.4), (-3.4, 3.4)],
        "diamond": [(0, -4.8), (4.8, 0), (0, 4.8), (-4.8, 0)],
        "triangle": [(0, -4.6), (4.4, 3.4), (-4.4, 3.4)],
    }
    if kind == "circle":
        return tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=3.8, cls="dot")
    return tag("path", d="M" + "L".join(f"{x + dx:.1f} {y + dy:.1f}" for dx, dy in corners[kind]) + "Z", cls="dot")


def _end_labels(ends: list[tuple[Series, tuple[float, float]]]) -> list[Markup]:
    """Labels beside the last points, pushed apart where lines end close together."""
    ends = sorted(ends, key=lambda end: end[1][1])
    heights: list[float] = []
    for _, (_, y) in ends:
        heights.append(max(y, heights[-1] + LABEL_GAP) if heights else y)
    # First pushed down in order, then the last ones back up where they left the chart.
    overflow = heights[-1] - (HEIGHT - BOTTOM) if heights else 0.0
    for index in reversed(range(len(heights))):
        below = heights[index + 1] - LABEL_GAP if index + 1 < len(heights) else heights[index] - max(0.0, overflow)
        heights[index] = min(heights[index], below)
    x = WIDTH - RIGHT + 6
    return [
        tag("text", line.label, x=x, y=f"{y + 4:.1f}", cls=f"end {line.css}")
        for (line, _), y in zip(ends, heights, strict=True)
    ]


def _frame(
    title: str,
    x_label: str,
    x_ticks: list[tuple[float, str]],
    y_ticks: list[tuple[float, str]],
    content: Iterable[Markup],
) -> Markup:
    """Title, axes, grid and labels around a plot."""
    floor, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    grid = [tag("line", x1=LEFT, x2=right, y1=f"{y:.1f}", y2=f"{y:.1f}", cls="grid") for y, _ in y_ticks]
    # 4 below the line: the middle of the digits, since SVG places text by its baseline.
    rows = [tag("text", text, x=LEFT - 8, y=f"{y + 4:.1f}", cls="tick left") for y, text in y_ticks]
    columns = [tag("text", text, x=f"{x:.1f}", y=floor + 18, cls="tick middle") for x, text in x_ticks]
    labels = [
        tag("text", title, x=0, y=13, cls="title"),
        tag("text", x_label, x=f"{(LEFT + right) / 2:.1f}", y=HEIGHT - 4, cls="axis middle"),
        tag("line", x1=LEFT, x2=right, y1=floor, y2=floor, cls="base"),
    ]
    size = f"0 0 {WIDTH:.0f} {HEIGHT:.0f}"
    return tag("svg", *grid, *labels, *rows, *columns, *content, viewBox=size, role="img", aria_label=title, cls="chart")


@dataclass(frozen=True)
class Column:
    """One stacked column or bar: its parts as (colour class, value, tooltip) from the axis outward.

    A value that is no length (negative, or not finite) counts as zero.
    """

    label: str
    parts: Sequence[tuple[str, float, str]]

    @property
    def lengths(self) -> list[tuple[str, float, str]]:
        """The parts with what is drawn of them; one of more than 1e300 would leave no number for the sum."""
        return [(css, value if 0 < value <= 1 / LEAST else 0.0, tip) for css, value, tip in self.parts]

    @property
    def total(self) -> float:
        """The length of the whole column."""
        return sum(value for _, value, _ in self.lengths)


def stacked_columns(columns: Sequence[tuple[int, Column]], *, title: str, x_label: str, form: Callable[[float], str]) -> Markup:
    """Columns at whole-numbered x, value axis from zero; of more than `MOST_POINTS` evenly spaced ones."""
    title += shown_of(len(columns), x_label)
    columns = thinned(columns)
    if not columns:
        return tag("p", f"{title}: nothing to draw.", cls="empty")
    # Stacked lengths only compare from a common zero.
    axis = Axis.around([column.total for _, column in columns], zero=True)
    first, last = columns[0][0], columns[-1][0]
    # By number and not by count: rounds that are missing leave their place empty.
    slot = (WIDTH - LEFT - RIGHT) / (last - first + 1)
    width = min(0.78 * slot, 56.0)

    def middle(x: int) -> float:
        return LEFT + (x - first + 0.5) * slot

    bars = []
    for x, column in columns:
        base = 0.0
        for css, value, tip in column.lengths:
            top, bottom = (axis.place(base + part, HEIGHT - BOTTOM, TOP) for part in (value, 0.0))
            bars.append(_rect(middle(x) - width / 2, top, width, bottom - top, css, tip))
            base += value
    x_ticks = [(middle(x), str(x)) for x in whole_ticks(first, last)]
    y_ticks = [(axis.place(y, HEIGHT - BOTTOM, TOP), form(y)) for y in axis.ticks()]
    return _frame(title, x_label, x_ticks, y_ticks, bars)


def dense_columns(columns: Sequence[Column], strip: Sequence[str]) -> Markup:
    """Many thin columns that fill any width, no text inside; `strip` colours a line below, one class per column."""
    if not columns:
        return tag("p", "Nothing to draw.", cls="empty")
    # 1 where all are empty: nothing is drawn, and nothing is divided by zero.
    high = max((column.total for column in columns), default=0.0) or 1.0
    rects = []
    for x, (column, css) in enumerate(zip(columns, strip, strict=True)):
        base = 100.0
        for part, value, tip in column.lengths:
            tall = 100 * value / high
            rects.append(_rect(x + 0.06, base - tall, 0.88, tall, part, tip))
            base -= tall
        rects.append(_rect(x, 103, 1, 5, css, column.label))
    box = f"0 0 {len(columns)} 108"
    return tag(
        "svg",
        *rects,
        viewBox=box,
        # Stretched to any width: hence no text inside, which would be stretched, too.
        preserveAspectRatio="none",
        role="img",
        cls="dense",
        # At least two pixels a column; the frame scrolls instead.
        style=f"min-width:{2 * len(columns)}px",
    )


def _rect(x: float, y: float, width: float, height: float, css: str, tip: str) -> Markup:
    return tag("rect", x=f"{x:.2f}", y=f"{y:.2f}", width=f"{width:.2f}", height=f"{height:.2f}", cls=f"bar {css}", data_t=tip)


def bar_rows(rows: Sequence[tuple[str, Markup, Column, str]]) -> Markup:
    """Horizontal bars of named things: (name, mark beside it, bar, figure at its end)."""
    high = max((column.total for _, _, column, _ in rows), default=0.0) or 1.0
    lines = []
    for name, mark, column, figure in rows:
        parts = [
            tag("i", cls=f"bar {css}", style=f"width:{100 * value / high:.3f}%", data_t=tip)
            for css, value, tip in column.lengths
            if value > 0
        ]
        lines.append(
            tag(
                "div",
                tag("span", name, cls="name", data_t=name),
                mark,
                tag("span", *parts, cls="track"),
                tag("span", figure, cls="figure"),
            )
        )
    return tag("div", join(lines), cls="rows")


def tier_colours(tiers: Sequence[str]) -> dict[str, str]:
    """A colour class per tier (the highest first), spread over the eight steps of the ordinal palette, the strong end first."""
    last = max(1, len(tiers) - 1)
    # Spread over the palette: two tiers get its two ends, which are easy to tell apart.
    return {tier: f"t{round(index * 7 / last)}" for index, tier in enumerate(tiers)}


def tier_mark(css: str, tier: str | None) -> Markup:
    """The small coloured badge of a budget tier."""
    return tag("span", f"k {formats.MISSING if tier is None else tier}", cls=f"chip {css}")
