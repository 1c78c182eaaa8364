"""Command and Report: the subcommands of launch/bench.py, which measure and which read what was measured."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmoe_ds import shell
from fedmoe_ds.bench.harness.repeats import with_notes
from fedmoe_ds.bench.harness.table import Column, Row, Table

Note = Callable[[str], None]
Option = tuple[str, dict[str, Any]]
"""Name and keywords of `add_argument`."""


def option(name: str, default: Any = None, help: str | None = None, **keywords: Any) -> Option:
    """An option of the type of its default; where that is a list, it takes one word or more."""
    several = isinstance(default, list)
    kind = type(default[0] if several else "" if default is None else default)
    usual = {"action": "store_true"} if kind is bool else {"type": kind, **({"nargs": "+"} if several else {})}
    return name, {**usual, "default": default, "help": help, **keywords}


SEED = option("--seed", 0)
JSON = option("--json", None, "also write the result to this file", type=Path)


@dataclass(frozen=True)
class Command:
    """A measurement.

    Attributes:
        name: the subcommand; also the name under which its results are stored.
        help: one line.
        options: its options (`--json` is added to all).
        run: measures. Notes say what is going on.
        columns: of the table for the terminal and for docs/performance.md, one line per row.
        words: the columns that hold text.
        lines: sentences below the table.
        table: the whole table, where it is not one line per row.
        stored: what `--json` holds instead of the rows with their origin; None for that.
        about: one or two sentences for docs/performance.md: what is measured, and what its floor is.
        code: the exit code that its rows mean; None for 0.
    """

    name: str
    help: str
    options: Sequence[Option]
    run: Callable[[argparse.Namespace, Note], list[Row]]
    columns: Sequence[Column] = ()
    words: tuple[str, ...] = ()
    lines: Callable[[list[Row]], Iterable[str]] | None = None
    table: Callable[[list[Row]], Table] | None = None
    stored: Callable[[list[Row]], Any] | None = None
    about: str = ""
    code: Callable[[list[Row]], int] | None = None

    def show(self, rows: list[Row]) -> Table:
        """Rows as a table, with what its marks mean."""
        if self.table is not None:
            return with_notes(self.table(rows))
        return with_notes(Table.of(rows, self.columns, self.lines(rows) if self.lines else (), self.words))


@dataclass(frozen=True)
class Report:
    """A subcommand without rows of its own: it reads stored results, or has other subcommands run.

    Attributes:
        name, help, options: as for `Command`.
        run: the text for standard output, and the exit code. Notes say what is going on.
    """

    name: str
    help: str
    options: Sequence[Option]
    run: Callable[[argparse.Namespace, Note], tuple[str, int]]


def add_options(parser: argparse.ArgumentParser, options: Iterable[Option]) -> None:
    for name, keywords in options:
        parser.add_argument(name, **keywords)


def values_of(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Some options by name."""
    return {name: getattr(args, name) for name in names}


_PLACES = ("--json", "--folder")


def command_line(arguments: list[str]) -> str:
    """What to type to measure again: the arguments, less where files go, which changes nothing about the measurement."""
    kept: list[str] = []
    after = False
    for argument in arguments:
        if not after and argument.partition("=")[0] not in _PLACES:
            kept.append(argument)
        after = argument in _PLACES
    return shell.command_line(["python", "launch/bench.py", *kept])
