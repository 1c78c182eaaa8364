"""Tables: rows of text cells as Markdown whose columns line up, so that it reads as plain text in a terminal too."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate

from fedmoe_ds.terminal import visible


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """A Markdown table; the first `text_columns` columns are text on the left, the others figures on the right."""
    cells = [[visible(text).replace("|", "\\|") for text in row] for row in (head, *rows)]
    sides = ["left" if column < text_columns else "right" for column in range(len(head))]
    return tabulate(cells[1:], cells[0], tablefmt="pipe", colalign=sides, disable_numparse=True)
