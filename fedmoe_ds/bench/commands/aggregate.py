"""`launch/bench.py aggregate`: the sums of a round over torch and over MPI, against copying memory."""

from __future__ import annotations

import argparse

from fedmoe_ds.bench import aggregate
from fedmoe_ds.bench.command import Command, Note
from fedmoe_ds.bench.table import Column, Row, Table, percent

COLUMNS: list[Column] = [
    ("sums", lambda row: row["shape"]),
    ("ranks", lambda row: str(row["ranks"])),
    ("backend", lambda row: row["system"]),
    ("sum ms", lambda row: f"{1000 * row['sum_s']:.1f}"),
    ("with packing ms", lambda row: f"{1000 * row['reduce_s']:.1f}"),
    ("GB/s moved", lambda row: f"{row['moved_bytes_per_s'] / 1e9:.2f}"),
    ("copying alone ms", lambda row: f"{1000 * row['floor_s']:.1f}"),
    ("floor share", lambda row: percent(row["floor_share"])),
]


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, default=2, help="processes, one cluster each")
    parser.add_argument("--mib", type=int, nargs="+", default=[1, 16, 128], help="sizes of the sums")
    parser.add_argument("--rounds", type=int, default=7, help="repeats; medians are reported")


def run(args: argparse.Namespace, note: Note) -> list[Row]:
    return aggregate.run_aggregate(args.ranks, args.mib, args.rounds)


def show(rows: list[Row]) -> Table:
    """Backends by size: the sum alone, the whole reduction of a round's statistics, and the floor of copying."""
    return Table.of(rows, COLUMNS)


COMMAND = Command("aggregate", "the sums of a round over torch and over MPI, against copying memory", options, run, show)
