"""Picture: one panel per budget tier, one line per method: its seeds, their mean and their spread. A stand-alone SVG file."""

from __future__ import annotations

import math

from fedmoe_ds.report.markup import Markup, tag
from fedmoe_ds.report.svg import Axis
from fedmoe_ds.studies.compare.aggregate import FOUNDATION, Comparison
from fedmoe_ds.studies.compare.table import number
from fedmoe_ds.studies.spread import Spread, with_spread

PANEL, GAP, COLUMNS = 470.0, 30.0, 2
ROW, HEAD, FOOT, TITLE = 30.0, 44.0, 46.0, 40.0
VALUE, LETTER = 96.0, 6.9
# Okabe and Ito's colours; every line also carries its name, so that nothing depends on telling colours apart.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#5d6169", "#b8a800")
_STYLE = """
text { font: 13px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: #1b1c1f }
.page { fill: #ffffff } .title { font-size: 16px; font-weight: 600 } .head { font-weight: 600 } .soft { fill: #5d6169 }
.tick { font-size: 11.5px; fill: #5d6169; text-anchor: middle } .value { text-anchor: end; font-variant-numeric: tabular-nums }
.grid { stroke: #e3e3de } .base { stroke: #8b8f97 } .whisker { stroke-width: 2.5 } circle { stroke: #ffffff; stroke-width: 1.2 }
@media (prefers-color-scheme: dark) {
  text { fill: #eceae4 } .page { fill: #1c1e22 } .soft, .tick { fill: #a9adb6 }
  .grid { stroke: #34373d } .base { stroke: #7d828c } circle { stroke: #1c1e22 }
}
"""


def picture(comparison: Comparison) -> str:
    """Perplexity on the global hold-out: all tiers, all methods. Empty panels say so."""
    rows = math.ceil(len(comparison.tiers) / COLUMNS)
    tall = HEAD + ROW * len(comparison.labels) + FOOT
    columns = max(1, min(COLUMNS, len(comparison.tiers)))
    width, height = 2 * GAP + columns * PANEL + (columns - 1) * GAP, TITLE + rows * tall
    panels = []
    for place, tier in enumerate(comparison.tiers):
        across, down = GAP + place % COLUMNS * (PANEL + GAP), TITLE + place // COLUMNS * tall
        panels.append(tag("g", *_panel(comparison, tier), transform=f"translate({across:g} {down:g})"))
    title = "Perplexity on the global hold-out: mean and sample standard deviation over seeds"
    return tag(
        "svg",
        tag("style", Markup(_STYLE)),
        tag("rect", width=width, height=height, cls="page"),
        tag("text", title, x=GAP, y=27, cls="title"),
        *panels,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width:g} {height:g}",
        width=width,
        height=height,
        role="img",
        aria_label=title,
    )


def _panel(comparison: Comparison, tier: str) -> list[Markup]:
    lines = {line.label: line.figures.get("perplexity") for line in comparison.lines(tier)}
    spreads = {label: s for label in comparison.labels if (s := lines.get(label)) and math.isfinite(s.mean)}
    base = lines[FOUNDATION]
    head = [tag("text", f"top-k {tier}", x=0, y=22, cls="head")]
    if base is not None:
        head.append(tag("text", f"foundation {with_spread(base, number)}", x=PANEL, y=22, cls="soft value"))
    left = LETTER * max(map(len, comparison.labels)) + 14
    reach = [end for spread in spreads.values() for end in _ends(spread)]
    axis = Axis.around(reach)
    floor = HEAD + ROW * len(comparison.labels)

    def at(value: float) -> float:
        return axis.place(value, left, PANEL - VALUE)

    ticks = [value for value in axis.ticks() if value >= 0] if reach else []
    grid = [tag("line", x1=f"{at(v):.1f}", x2=f"{at(v):.1f}", y1=HEAD - 6, y2=floor, cls="grid") for v in ticks]
    labels = [tag("text", f"{v:g}", x=f"{at(v):.1f}", y=floor + 18, cls="tick") for v in ticks]
    drawn = []
    for place, label in enumerate(comparison.labels):
        middle = HEAD + (place + 0.5) * ROW - 3
        drawn.append(tag("text", label, x=0, y=f"{middle + 4.5:.1f}"))
        if label in spreads:
            ends = tuple(at(value) for value in _ends(spreads[label])[:2])
            marks = [at(value) for value in spreads[label].values.values()]
            drawn.append(_mark(_COLOURS[place % len(_COLOURS)], middle, at(spreads[label].mean), ends, marks))
        text = with_spread(spreads[label], number) if label in spreads else "not finite" if lines.get(label) else "no run"
        drawn.append(tag("text", text, x=PANEL, y=f"{middle + 4.5:.1f}", cls="value"))
    base_line = tag("line", x1=left, x2=PANEL - VALUE, y1=floor, y2=floor, cls="base")
    return [*head, *grid, base_line, *labels, *drawn]


def _ends(spread: Spread) -> list[float]:
    """What a line must show: the whisker's ends first, then every seed."""
    reach = spread.std or 0.0
    return [spread.mean - reach, spread.mean + reach, *spread.values.values()]


def _mark(colour: str, y: float, mean: float, ends: tuple[float, ...], seeds: list[float]) -> Markup:
    whisker = tag("line", x1=f"{ends[0]:.1f}", x2=f"{ends[1]:.1f}", y1=y, y2=y, cls="whisker", stroke=colour)
    dots = [tag("circle", cx=f"{x:.1f}", cy=y, r=3.5) for x in seeds] if len(seeds) > 1 else []
    return tag("g", whisker, *dots, tag("circle", cx=f"{mean:.1f}", cy=y, r=6), fill=colour)
