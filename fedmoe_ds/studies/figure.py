"""Figure: the look that the pictures of studies share, and their way into SVG that is the same text for the same figures.

matplotlib is imported where something is drawn: it takes a second, and a run or a list of points draws nothing.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart without seeing red or green, and in print.
BLUE, ORANGE, GREEN, PINK, SKY, VERMILION, GREY = "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8b8f97"
LINES = (BLUE, VERMILION, GREEN, PINK, SKY, ORANGE, GREY)
"""In the order in which lines take them."""
INK, SOFT = "#1b1c1f", "#5d6169"
COLUMNS = 2
"""Panels in a row."""
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be searched, copied and read aloud
    "svg.hashsalt": "fedmoe-ds",  # names of clip paths would be random
    "text.parse_math": False,  # a label is not ours, and a dollar in it no formula
    "text.color": INK,
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": SOFT,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e3e3de",
    "grid.linewidth": 0.8,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
    "errorbar.capsize": 3.0,
    "legend.frameon": False,
    "figure.facecolor": "white",  # pages may be dark
}


@contextmanager
def styled() -> Iterator[None]:
    """Everything drawn inside looks alike, whatever a user's matplotlibrc says."""
    from matplotlib import style

    with style.context(_STYLE, after_reset=True), warnings.catch_warnings():
        # Only the width of a letter that the measuring font lacks is guessed; the viewer's own font draws it.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from", UserWarning)
        yield


def panels(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, `COLUMNS` in a row, each of this width and height in inches, without overlaps."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = max(1, min(COLUMNS, count))
    rows = -(-count // columns)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    figure = Figure(figsize=(columns * width, rows * height + 0.35), layout=layout)
    return figure, [figure.add_subplot(rows, columns, place + 1) for place in range(count)]


def svg(draw: Callable[[], Figure], title: str) -> str:
    """A figure with its title, and without the date and the version of the library, as the text of an SVG file."""
    out = io.StringIO()
    with styled():
        figure = draw()
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        figure.savefig(out, format="svg", metadata={"Title": title, "Date": None, "Creator": None})
    return out.getvalue()
