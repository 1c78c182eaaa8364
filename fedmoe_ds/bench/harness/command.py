"""Command and Report: the subcommands of launch/bench.py, which measure and which read what was measured.

Each lives in a file of its name, under `bench/commands/` or `bench/reports/`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmoe_ds import shell
from fedmoe_ds.bench.harness.table import Row, Table

Note = Callable[[str], None]


@dataclass(frozen=True)
class Command:
    """A measurement.

    Attributes:
        name: the subcommand; also the name under which its results are stored.
        help: one line.
        options: adds its options to a parser (`--json` is added to all).
        run: measures. Notes say what is going on.
        show: rows as a table, for the terminal and for docs/performance.md.
        stored: what `--json` holds instead of the rows with their origin; None for that.
        about: one or two sentences for docs/performance.md: what is measured, and what its floor is.
    """

    name: str
    help: str
    options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Note], list[Row]]
    show: Callable[[list[Row]], Table]
    stored: Callable[[list[Row]], Any] | None = None
    about: str = ""


@dataclass(frozen=True)
class Report:
    """A subcommand without rows of its own: it reads stored results, or has other subcommands run.

    Attributes:
        name: the subcommand.
        help: one line.
        options: adds its options to a parser.
        run: the text for standard output, and the exit code. Notes say what is going on.
    """

    name: str
    help: str
    options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Note], tuple[str, int]]


def add_seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0)


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, help="also write the result to this file")


def command_line(arguments: list[str]) -> str:
    """What to type to measure again: the arguments, less `--json`, which changes nothing about the measurement."""
    kept: list[str] = []
    after = False
    for argument in arguments:
        if not after and argument != "--json" and not argument.startswith("--json="):
            kept.append(argument)
        after = argument == "--json"
    return shell.command_line(["python", "launch/bench.py", *kept])
