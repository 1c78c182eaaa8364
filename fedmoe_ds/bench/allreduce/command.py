"""`launch/bench.py aggregate`: the sums of a round over torch and over MPI, against the libraries' own all-reduce."""

from __future__ import annotations

import argparse

from fedmoe_ds.bench.allreduce import measure as aggregate
from fedmoe_ds.bench.harness.command import Command, Note
from fedmoe_ds.bench.harness.repeats import shown, with_notes
from fedmoe_ds.bench.harness.table import Column, Row, Table, percent

COLUMNS: list[Column] = [
    ("sums", lambda row: row["shape"]),
    ("ranks", lambda row: str(row["ranks"])),
    ("backend", lambda row: row["system"]),
    ("all-reduce ms", lambda row: shown(row, "raw_s", milliseconds)),
    ("round's sums ms", lambda row: shown(row, "reduce_s", milliseconds)),
    ("of its bandwidth", lambda row: shown(row, "bandwidth_share", percent)),
    ("GB/s moved", lambda row: shown(row, "moved_bytes_per_s", lambda rate: f"{rate / 1e9:.2f}")),
    ("copying alone ms", lambda row: shown(row, "floor_s", milliseconds)),
    ("floor share", lambda row: shown(row, "floor_share", percent)),
]


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.2f}"


ABOUT = (
    "The sums of a round over gloo and over MPI, in the same processes, against the same library's own all-reduce of one "
    "tensor with as many bytes, in the same run. The floor is copying, on all ranks at once, the bytes that an all-reduce has "
    "to move."
)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, default=2, help="processes, one cluster each")
    parser.add_argument("--mib", type=int, nargs="+", default=[1, 16, 128], help="sizes of the sums")
    parser.add_argument("--rounds", type=int, default=21, help="repeats; medians are reported")


def run(args: argparse.Namespace, note: Note) -> list[Row]:
    return aggregate.run_aggregate(args.ranks, args.mib, args.rounds)


def show(rows: list[Row]) -> Table:
    """Backends by size: the library's all-reduce of the same bytes, the reduction of a round's statistics, copying."""
    least = min(rows, key=lambda row: row["bandwidth_share"])
    where = f"{least['shape']} over {least['system']}"
    line = (
        f"the sums of a round reach at least {shown(least, 'bandwidth_share', percent)} of the library's all-reduce ({where})"
    )
    return with_notes(Table.of(rows, COLUMNS, [line]))


COMMAND = Command("aggregate", "the sums of a round against all-reduce over torch and MPI", options, run, show, about=ABOUT)
