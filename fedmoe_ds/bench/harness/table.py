"""Table: rows of a result as aligned text or Markdown, and as a JSON document that says how and where they were measured."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tabulate import tabulate

from fedmoe_ds.errors import UserError
from fedmoe_ds.machine import machine_facts
from fedmoe_ds.storage.files import check_replaceable, write_whole
from fedmoe_ds.terminal import visible

Row = dict[str, Any]
"""One measurement. Every row has shape, system, tokens_per_s, peak_mib and floor_share (null where it has no meaning)."""

Column = tuple[str, Callable[[Row], str]]


@dataclass(frozen=True)
class Table:
    """Cells under a header, and sentences below them. The columns named in `words` hold text and are flush left."""

    header: list[str]
    cells: list[list[str]]
    lines: list[str] = field(default_factory=list)
    words: tuple[str, ...] = ()

    @classmethod
    def of(cls, rows: list[Row], columns: Sequence[Column], lines: Iterable[str] = (), words: tuple[str, ...] = ()) -> Table:
        """One line per row."""
        return cls([name for name, _ in columns], [[show(row) for _, show in columns] for row in rows], list(lines), words)

    def text(self) -> str:
        """For a terminal; columns of figures are flush right."""
        cells = [[visible(cell) for cell in line] for line in (self.header, *self.cells)]
        sides = ["left" if name in self.words else "right" for name in self.header]
        shown = tabulate(cells, tablefmt="plain", disable_numparse=True, colalign=sides)
        return "\n".join([*shown.splitlines(), *self.lines])

    def markdown(self) -> str:
        """For a page."""
        every = [self.header, ["---"] * len(self.header), *self.cells]
        shown = ["| " + " | ".join(visible(cell).replace("|", "\\|") for cell in line) + " |" for line in every]
        return "\n".join([*shown, *[f"\n{line}" for line in self.lines]])


def percent(share: float | None) -> str:
    """A share as a percentage; empty where there is none."""
    return "" if share is None else f"{100 * share:.0f} %"


def whole(number: float | None) -> str:
    """A rounded number; empty where there is none."""
    return "" if number is None else f"{number:.0f}"


def one_decimal(share: float) -> str:
    """A small share as a percentage."""
    return f"{100 * share:.1f} %"


def two_digits(number: float) -> str:
    """Two decimals."""
    return f"{number:.2f}"


def check_writable(path: Path | None) -> None:
    """Find out before the measurement whether its result can be stored. Raises UserError."""
    if path is None:
        return
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"--json: {path}: cannot be written; give a file in an existing folder")
    try:
        check_replaceable(path, links=False)
    except OSError as error:
        raise UserError(f"--json: {path}: {error.strerror}; give another file") from None


def document(name: str, command: str, rows: list[Row]) -> dict[str, Any]:
    """What `--json` stores: rows with the command line, the date, hardware and versions."""
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    return {"benchmark": name, "command": command, "date": today, "machine": machine_facts(), "rows": rows}


def write_json(content: Any, path: Path) -> None:
    """Store a document. Raises UserError when the file cannot be written."""
    try:
        write_whole(path, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--json: {path}: cannot be written: {error.strerror or error}") from error
