"""Quantiles: how a figure lies over more clients than a table can name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fedmoe_ds.report import formats
from fedmoe_ds.report.markup import Markup, table, tag

SHARES = {"least": 0.0, "5 %": 0.05, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "95 %": 0.95, "most": 1.0}
Row = tuple[str, NDArray[np.float64], Callable[[float | None], str]]


def quantile_table(noun: str, rows: Sequence[Row]) -> Markup:
    """A row per figure: how many clients have it, its quantiles and its mean.

    Args:
        noun: what the rows are.
        rows: name, values over clients [clients] with NaN where there is none, and how a value is written.
    """
    head = [noun, "clients", *SHARES, "mean"]
    body = [[name, *_cells(values, form)] for name, values, form in rows]
    return tag("div", table(head, body), cls="scroll")


def _cells(values: NDArray[np.float64], form: Callable[[float | None], str]) -> list[str]:
    known = values[np.isfinite(values)]
    if not len(known):
        return [formats.count(0), *([formats.MISSING] * (len(SHARES) + 1))]
    # Between two clients there is none: every quantile is the figure of one, the ends are those of the outermost.
    quantiles = np.quantile(known, list(SHARES.values()), method="inverted_cdf")
    with np.errstate(over="ignore"):
        mean = float(known.mean())
    return [formats.count(len(known)), *(form(float(value)) for value in quantiles), form(mean)]
