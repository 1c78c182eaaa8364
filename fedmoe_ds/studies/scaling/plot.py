"""Plot: throughput, efficiency, where the time goes, and predicted beside measured, over the axis of a study."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fedmoe_ds.studies import figure
from fedmoe_ds.studies.ratio import Ratio
from fedmoe_ds.studies.scaling.measured import PHASES
from fedmoe_ds.studies.scaling.rows import Line, efficiency_ratio
from fedmoe_ds.studies.scaling.study import Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 5.0, 3.2
"""Inches of a panel."""
_PHASE_COLOURS = dict(zip((*PHASES, "other"), (figure.BLUE, figure.VERMILION, figure.SKY, figure.GREY), strict=True))
Panel = Callable[["Axes", Study, Sequence[Line]], None]


def picture(study: Study, lines: Sequence[Line]) -> str:
    """All panels that have something to show as SVG, two in a row."""
    title = study.title if study.repeats == 1 else f"{study.title}: mean and sample standard deviation over repeats"
    return figure.svg(lambda: draw(study, lines), title)


def draw(study: Study, lines: Sequence[Line]) -> Figure:
    """The same as a figure; to be called within `figure.styled()`."""
    panels: list[Panel] = [_throughput, _efficiency, _phases]
    if all("all_to_all_s" in line.figures for line in lines):
        panels.append(_waiting)
    if all("predicted_s" in line.figures for line in lines):
        panels.append(_predicted)
    drawing, places = figure.panels(len(panels), WIDTH, HEIGHT)
    for axes, panel in zip(places, panels, strict=True):
        panel(axes, study, lines)
        _finish(axes, study)
    return drawing


def _throughput(axes: Axes, study: Study, lines: Sequence[Line]) -> None:
    name, scale, unit = ("flops_per_s", 1e9, "GFLOP/s") if study.by_flops else ("tokens_per_s", 1.0, "tokens/s")
    axes.set_title("Throughput")
    axes.set_ylabel(unit)
    _line(axes, lines, name, "measured", figure.BLUE, scale)
    means = [(line, line.figures[name].mean / scale) for line in lines if name in line.figures]
    # On the same ranks at every value there is nothing that should grow.
    if means and len({line.measured.ranks for line in lines}) > 1:
        base, first = means[0]
        ideal = [_drawable(first * line.measured.ranks / base.measured.ranks) for line in lines]
        places = [line.value for line in lines]
        axes.errorbar(places, ideal, fmt="--", color=figure.GREY, label="ideal", zorder=1.5)


def _efficiency(axes: Axes, study: Study, lines: Sequence[Line]) -> None:
    axes.set_title("Efficiency")
    axes.set_ylabel("% of the first value")
    for training, label, colour in ((True, "training", figure.GREEN), (False, "whole round", figure.GREY)):
        known = [(line.value, ratio) for line in lines if (ratio := efficiency_ratio(study, lines, line, training)) is not None]
        _ratios(axes, known, label, colour)
    _reach(axes, lines)


def _ratios(axes: Axes, known: Sequence[tuple[int, Ratio]], label: str, colour: str) -> None:
    """Shares over the axis with their intervals, where there are any."""
    means = [_drawable(100 * ratio.value) for _, ratio in known]
    bounds = [(ratio.low, ratio.high) if ratio.low is not None and ratio.high is not None else None for _, ratio in known]
    below = [0.0 if bound is None else _drawable(mean - 100 * bound[0]) for mean, bound in zip(means, bounds, strict=True)]
    above = [0.0 if bound is None else _drawable(100 * bound[1] - mean) for mean, bound in zip(means, bounds, strict=True)]
    whiskers = [below, above] if any(above) else None
    places = [value for value, _ in known]
    axes.errorbar(places, means, yerr=whiskers, color=colour, marker="o", markeredgecolor="white", label=label)


def _predicted(axes: Axes, study: Study, lines: Sequence[Line]) -> None:
    axes.set_title("Seconds per round: predicted and measured")
    axes.set_ylabel("seconds, without the checkpoint")
    _line(axes, lines, "recorded_s", "measured", figure.BLUE)
    _line(axes, lines, "predicted_s", "predicted", figure.VERMILION, marker="s")


def _phases(axes: Axes, study: Study, lines: Sequence[Line]) -> None:
    axes.set_title("Where a round's seconds go: phases of rank 0")
    axes.set_ylabel("seconds")
    _stacks(axes, lines, [(name, colour, _means(lines, f"{name}_s")) for name, colour in _PHASE_COLOURS.items()])


def _waiting(axes: Axes, study: Study, lines: Sequence[Line]) -> None:
    axes.set_title("The same seconds: inside collectives")
    axes.set_ylabel("seconds, with waiting for peers")
    whole, inside, others = (_means(lines, name) for name in ("s_per_round", "all_to_all_s", "other_collectives_s"))
    computing = [max(0.0, total - a - b) for total, a, b in zip(whole, inside, others, strict=True)]
    parts = [("computing", figure.BLUE, computing), ("in all-to-all", figure.ORANGE, inside)]
    _stacks(axes, lines, [*parts, ("in other collectives", figure.PINK, others)])


def _line(axes: Axes, lines: Sequence[Line], name: str, label: str, colour: str, scale: float = 1.0, marker: str = "o") -> None:
    """A figure over the axis, with a whisker where repeats differ."""
    known = [(line.value, line.figures[name]) for line in lines if name in line.figures]
    means = [_drawable(spread.mean / scale) for _, spread in known]
    reach = [_drawable((spread.std or 0.0) / scale) for _, spread in known]
    places, whiskers = [value for value, _ in known], reach if any(reach) else None
    axes.errorbar(places, means, yerr=whiskers, color=colour, marker=marker, markeredgecolor="white", label=label)
    _reach(axes, lines)


def _reach(axes: Axes, lines: Sequence[Line]) -> None:
    """From the first value to the last, whichever of them is known."""
    from matplotlib.ticker import MaxNLocator

    low, high = lines[0].value, lines[-1].value
    air = 0.05 * (high - low) or 0.5
    axes.set_xlim(low - air, high + air)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))


def _stacks(axes: Axes, lines: Sequence[Line], parts: Sequence[tuple[str, str, Sequence[float]]]) -> None:
    """One column per value, evenly spaced."""
    places, floor = range(len(lines)), [0.0] * len(lines)
    for label, colour, values in parts:
        axes.bar(places, values, bottom=floor, width=0.6, color=colour, label=label, edgecolor="white", linewidth=0.6)
        floor = [below + value for below, value in zip(floor, values, strict=True)]
    axes.set_xticks(places, [str(line.value) for line in lines])
    axes.set_xlim(-0.6, len(lines) - 0.4)
    axes.grid(axis="x", visible=False)


def _means(lines: Sequence[Line], name: str) -> list[float]:
    """Heights of parts of a stack; what is no length counts as zero."""
    means = [line.figures[name].mean for line in lines]
    return [mean if 0 < mean < math.inf else 0.0 for mean in means]


def _drawable(value: float) -> float:
    """matplotlib leaves a gap for NaN; infinity would take the axis with it."""
    return value if math.isfinite(value) else math.nan


def _finish(axes: Axes, study: Study) -> None:
    """The value axis from zero with numbers written out, the legend below."""
    from matplotlib.ticker import FuncFormatter

    if not math.isfinite(axes.dataLim.height):
        axes.text(0.5, 0.5, "nothing to draw", transform=axes.transAxes, ha="center")
    # Cut off below, a bar or a ratio would look like more than it is.
    axes.set_ylim(bottom=0.0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.set_xlabel(study.axis)
    names = axes.get_legend_handles_labels()[1]
    if len(names) > 1:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=len(names), columnspacing=1.4, handlelength=1.5)
