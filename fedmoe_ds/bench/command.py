"""Command: one subcommand of launch/bench.py. Each lives in a file of its name under `bench/commands/`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmoe_ds.bench.table import Row, Table

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
    """

    name: str
    help: str
    options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Note], list[Row]]
    show: Callable[[list[Row]], Table]
    stored: Callable[[list[Row]], Any] | None = None


def add_seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0)


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, help="also write the result to this file")
