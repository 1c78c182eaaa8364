"""Plot: one panel per budget tier, one row per method: its seeds, their mean and sample standard deviation."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fedmoe_ds.studies import figure
from fedmoe_ds.studies.compare.aggregate import Comparison
from fedmoe_ds.studies.compare.table import number
from fedmoe_ds.studies.spread import Spread, with_spread
from fedmoe_ds.terminal import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "Perplexity on the global hold-out: mean and sample standard deviation over seeds"
WIDTH, LETTER, HEAD, ROW = 2.6, 0.085, 0.85, 0.24
"""Inches: of what is drawn in a panel, of a letter beside it, of the title with the axis, of a method."""
_COLOURS = (figure.BLUE, figure.VERMILION, figure.GREEN, figure.PINK, figure.SKY, figure.ORANGE, figure.SOFT, "#b8a800")


def picture(comparison: Comparison) -> str:
    """All tiers and all methods as SVG. Empty panels say so."""
    return figure.svg(lambda: draw(comparison), TITLE)


def draw(comparison: Comparison) -> Figure:
    """The same as a figure; to be called within `figure.styled()`."""
    letters = max(len(visible(label)) for label in comparison.labels)
    letters += max((len(_said(spread)) for tier in comparison.tiers for spread in _perplexities(comparison, tier)), default=0)
    drawing, places = figure.panels(len(comparison.tiers), WIDTH + LETTER * letters, HEAD + ROW * len(comparison.labels))
    for axes, tier in zip(places, comparison.tiers, strict=True):
        _panel(axes, comparison, tier)
    return drawing


def _panel(axes: Axes, comparison: Comparison, tier: str) -> None:
    axes.set_title(visible(f"top-k {tier}"))
    base = comparison.lines(tier)[0].figures.get("perplexity")
    if base is not None:
        axes.set_title(
            f"foundation {with_spread(base, number)}", loc="right", color=figure.SOFT, fontweight="normal", fontsize=9
        )
    for row, spread in enumerate(_perplexities(comparison, tier)):
        if spread is not None and math.isfinite(spread.mean):
            _mark(axes, row, spread, _COLOURS[row % len(_COLOURS)])
        axes.text(1.02, row, _said(spread), transform=axes.get_yaxis_transform(), va="center")
    axes.set_yticks(range(len(comparison.labels)), [visible(label) for label in comparison.labels])
    axes.set_ylim(len(comparison.labels) - 0.5, -0.5)  # the first method on top
    axes.tick_params(axis="y", length=0, labelcolor=figure.INK)
    axes.grid(axis="y", visible=False)
    if not axes.has_data():
        axes.set_xticks([])
    elif axes.get_xlim()[0] < 0:  # no perplexity is negative, though a deviation may be larger than its mean
        axes.set_xlim(left=0.0)


def _perplexities(comparison: Comparison, tier: str) -> list[Spread | None]:
    """By method; None without a finished run."""
    found = {line.label: line.figures.get("perplexity") for line in comparison.lines(tier)[1:]}
    return [found.get(label) for label in comparison.labels]


def _said(spread: Spread | None) -> str:
    return "no run" if spread is None else with_spread(spread, number)


def _mark(axes: Axes, row: int, spread: Spread, colour: str) -> None:
    """The mean with its deviation, and the seeds behind it."""
    reach = spread.std if spread.std is not None and math.isfinite(spread.std) else None
    if len(spread.values) > 1:
        seeds = list(spread.values.values())
        axes.plot(seeds, [row] * len(seeds), "o", color=colour, markeredgecolor="white", markersize=5, zorder=3)
    axes.errorbar(spread.mean, row, xerr=reach, fmt="o", color=colour, markeredgecolor="white", markersize=8, zorder=2.5)
