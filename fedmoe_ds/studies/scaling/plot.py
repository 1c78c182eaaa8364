"""Picture: throughput, efficiency, where the time goes, predicted beside measured: one SVG file of the report's charts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fedmoe_ds.report.markup import Markup, tag
from fedmoe_ds.report.svg import HEIGHT, WIDTH, Column, Series, line_chart, stacked_columns
from fedmoe_ds.studies.scaling.rows import Line
from fedmoe_ds.studies.scaling.study import Study
from fedmoe_ds.studies.scaling.table import number

GAP, TITLE, LEGEND, COLUMNS = 28.0, 44.0, 24.0, 2
LETTER = 7.0
# Okabe and Ito's colours, as in the other pictures; the strong ones are for what a run measured.
_COLOURS = {
    "l0": "#0072b2",
    "l1": "#e69f00",
    "l2": "#009e73",
    "l3": "#cc79a7",
    "l4": "#56b4e9",
    "l5": "#d55e00",
    "l7": "#8b8f97",
}
_STYLE = """
text { font: 12.5px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: #5d6169 }
.page { fill: #ffffff } .heading { font-size: 16px; font-weight: 600; fill: #1b1c1f } .chart { overflow: visible }
.title { font-size: 13.5px; font-weight: 600; fill: #1b1c1f } .left { text-anchor: end } .middle { text-anchor: middle }
.end { font-weight: 650 } .grid { stroke: #e3e3de } .base { stroke: #8b8f97 }
.line { fill: none; stroke-width: 2.2; stroke-linejoin: round } .dot { fill: #ffffff; stroke-width: 2 } .hit { fill: none }
@media (prefers-color-scheme: dark) {
  text { fill: #a9adb6 } .heading, .title { fill: #eceae4 } .page, .dot { fill: #1c1e22 } .grid { stroke: #34373d }
}
"""
_PHASES = {"train": ("l0", "train"), "aggregate": ("l5", "aggregate"), "evaluate": ("l4", "evaluate"), "other": ("l7", "other")}


def picture(study: Study, lines: Sequence[Line]) -> str:
    """All panels that have something to show, two in a row."""
    panels = [_throughput(study, lines), _efficiency(study, lines), _phases(study, lines)]
    if all("all_to_all_s" in line.figures for line in lines):
        panels.append(_waiting(study, lines))
    if all("predicted_s" in line.figures for line in lines):
        panels.append(_predicted(study, lines))
    tall, columns = HEIGHT + LEGEND + GAP, min(COLUMNS, len(panels))
    width = columns * (WIDTH + GAP) + GAP
    height = TITLE + -(-len(panels) // columns) * tall
    placed = [
        tag("g", panel, transform=f"translate({GAP + i % columns * (WIDTH + GAP):g} {TITLE + i // columns * tall:g})")
        for i, panel in enumerate(panels)
    ]
    heading = study.title
    return tag(
        "svg",
        tag("style", Markup(_STYLE + _colours())),
        tag("rect", width=width, height=height, cls="page"),
        tag("text", heading, x=GAP, y=27, cls="heading"),
        *placed,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width:g} {height:g}",
        width=width,
        height=height,
        role="img",
        aria_label=heading,
    )


def _colours() -> str:
    """Written out per class: viewers of single files often know no CSS variables."""
    return "".join(
        f".{name} .line, .{name} .dot {{ stroke: {value} }} rect.{name}, .end.{name} {{ fill: {value} }}\n"
        for name, value in _COLOURS.items()
    )


def _sized(chart: Markup) -> Markup:
    """A chart of a page has the size of its place; inside a picture it needs one of its own."""
    return Markup(chart.replace("<svg ", f'<svg width="{WIDTH:g}" height="{HEIGHT:g}" ', 1))


def _throughput(study: Study, lines: Sequence[Line]) -> Markup:
    figure, scale, unit = ("flops_per_s", 1e9, "GFLOP/s") if study.by_flops else ("tokens_per_s", 1.0, "tokens/s")
    means = [(line, line.figures[figure].mean / scale) for line in lines if figure in line.figures]
    series = [_series("l0", "measured", means, unit)]
    if means and len({line.measured.ranks for line in lines}) > 1:
        base, first = means[0]
        ideal = [(line, first * line.measured.ranks / base.measured.ranks) for line in lines]
        series.append(_series("l7", "ideal", ideal, unit))
    return _sized(line_chart(series, title=f"Throughput, {unit}", x_label=study.axis, form=_tick, zero=True))


def _efficiency(study: Study, lines: Sequence[Line]) -> Markup:
    means = [(line, 100 * line.figures["efficiency"].mean) for line in lines if "efficiency" in line.figures]
    series = [_series("l2", "", means, "%")]
    return _sized(line_chart(series, title="Efficiency, % of the first value", x_label=study.axis, form=_tick, zero=True))


def _predicted(study: Study, lines: Sequence[Line]) -> Markup:
    series = [
        _series(css, label, [(line, line.figures[figure].mean) for line in lines], "s")
        for css, label, figure in (("l0", "measured", "recorded_s"), ("l5", "predicted", "predicted_s"))
    ]
    title = "Seconds per round without the checkpoint: predicted and measured"
    return _sized(line_chart(series, title=title, x_label=study.axis, form=_tick, zero=True))


def _phases(study: Study, lines: Sequence[Line]) -> Markup:
    parts = [(css, label, _means(lines, f"{phase}_s")) for phase, (css, label) in _PHASES.items()]
    return _stacked(study, lines, parts, "Where a round's seconds go: phases of rank 0")


def _waiting(study: Study, lines: Sequence[Line]) -> Markup:
    inside, others = _means(lines, "all_to_all_s"), _means(lines, "other_collectives_s")
    whole = _means(lines, "s_per_round")
    computing = [max(0.0, total - a - b) for total, a, b in zip(whole, inside, others, strict=True)]
    parts = [("l0", "computing", computing), ("l1", "in all-to-all", inside), ("l3", "in other collectives", others)]
    return _stacked(study, lines, parts, "The same seconds: inside collectives, waiting for peers included")


def _means(lines: Sequence[Line], figure: str) -> list[float]:
    return [line.figures[figure].mean for line in lines]


def _stacked(study: Study, lines: Sequence[Line], parts: Sequence[tuple[str, str, list[float]]], title: str) -> Markup:
    """One column per value of the axis, and the colours of its parts below."""

    def column(place: int, line: Line) -> Column:
        pieces = [(css, values[place], f"{label} {number(values[place])} s") for css, label, values in parts]
        return Column(str(line.value), pieces)

    columns = [(line.value, column(place, line)) for place, line in enumerate(lines)]
    keys, x = [], 50.0
    for css, label, _ in parts:
        keys += [tag("rect", x=x, y=HEIGHT + 8, width=12, height=12, cls=css), tag("text", label, x=x + 18, y=HEIGHT + 18.5)]
        x += 18 + LETTER * len(label) + 16
    return tag("g", _sized(stacked_columns(columns, title=title, x_label=study.axis, form=_tick)), *keys)


def _series(css: str, label: str, points: Sequence[tuple[Line, float]], unit: str) -> Series:
    tips = [f"{line.value}: {number(y)} {unit}" for line, y in points]
    return Series(css, label, [(line.value, y) for line, y in points], tips)


_tick: Callable[[float], str] = "{:,.6g}".format
