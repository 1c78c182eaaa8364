"""`launch/bench.py plan`: predicted beside measured round time and memory of real runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from fedmoe_ds.bench.calibration.measure import calibrate
from fedmoe_ds.bench.harness.command import Command, Note
from fedmoe_ds.bench.harness.table import Column, Row, Table
from fedmoe_ds.bench.planned.measure import run_planned
from fedmoe_ds.planner import load_hardware

COLUMNS: list[Column] = [
    ("shape", lambda row: row["shape"]),
    ("ranks", lambda row: str(row["ranks"])),
    ("clusters x ep", lambda row: f"{row['clusters']} x {row['ep_size']}"),
    ("round s", lambda row: f"{row['round_s']:.2f}"),
    ("predicted", lambda row: f"{row['predicted_round_s']:.2f}"),
    ("ratio", lambda row: f"{row['round_ratio']:.2f}"),
    ("peak MiB", lambda row: f"{row['peak_mib']:.0f}"),
    ("predicted", lambda row: f"{row['predicted_mib']:.0f}"),
    ("ratio", lambda row: f"{row['memory_ratio']:.2f}"),
]


ABOUT = (
    "Round time and memory of real runs beside what the planner predicted for them, after a calibration of this "
    "machine. There is no floor: a ratio of 1 is a perfect prediction."
)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hardware", type=Path, help="a file of `calibrate`; default: calibrate first")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks (default: 1 2 4)")
    parser.add_argument("--case", nargs="+", default=["short", "narrow", "long"], help="shapes (default: all three)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of every run; the first one warms up and is not compared")


def run(args: argparse.Namespace, note: Note) -> list[Row]:
    hardware = calibrate(note) if args.hardware is None else load_hardware(args.hardware)
    return run_planned(args.case, args.ranks, args.rounds, hardware, note)


def show(rows: list[Row]) -> Table:
    """Predicted beside measured."""
    return Table.of(rows, COLUMNS)


COMMAND = Command("plan", "predicted beside measured round time and memory of real runs", options, run, show, about=ABOUT)
