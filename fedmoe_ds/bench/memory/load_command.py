"""`launch/bench.py load`: peak host memory per rank while a model is loaded."""

from __future__ import annotations

import argparse

from fedmoe_ds.bench.harness.command import Command, Note, add_seed
from fedmoe_ds.bench.harness.table import Column, Row, Table
from fedmoe_ds.bench.memory import load

COLUMNS: list[Column] = [
    ("ep_size", lambda row: str(row["ep_size"])),
    ("rank", lambda row: str(row["rank"])),
    ("peak MiB", lambda row: f"{row['peak_mib']:.0f}"),
    ("growth", lambda row: f"{row['growth_mib']:.0f}"),
    ("dense", lambda row: f"{row['dense_mib']:.0f}"),
    ("own experts", lambda row: f"{row['own_experts_mib']:.0f}"),
    ("whole model", lambda row: f"{row['model_mib']:.0f}"),
]


ABOUT = (
    "Peak memory of every rank while the experts of a model are spread over ranks, each in a process of its own. The "
    "floor is what a rank keeps: the dense part and its own experts. Every figure is one measurement."
)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ep-size", type=int, nargs="+", default=[1, 2, 4], help="expert-parallel sizes")
    parser.add_argument("--shape", default="load", help="load (about 600 MiB) or load-tiny")
    add_seed(parser)


def run(args: argparse.Namespace, note: Note) -> list[Row]:
    return load.run_load(args.ep_size, args.shape, args.seed, note)


def show(rows: list[Row]) -> Table:
    """Memory by rank, in MiB; growth is what loading added to the imported program."""
    return Table.of(rows, COLUMNS)


COMMAND = Command("load", "peak host memory per rank while a model is loaded", options, run, show, about=ABOUT)
