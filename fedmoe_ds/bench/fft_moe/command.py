"""`launch/bench.py experts`: a client step with few and with many adapter experts (FFT-MoE)."""

from __future__ import annotations

import argparse

from fedmoe_ds.bench.fft_moe import measure as pool
from fedmoe_ds.bench.fft_moe import workload as pool_workload
from fedmoe_ds.bench.harness.command import Command, Note, add_seed
from fedmoe_ds.bench.harness.repeats import shown, with_notes
from fedmoe_ds.bench.harness.table import Column, Row, Table, percent, two_digits, whole

COLUMNS: list[Column] = [
    ("system", lambda row: row["system"]),
    ("ms / step", lambda row: shown(row, "step_seconds", lambda seconds: f"{1000 * seconds:.0f}")),
    ("/ fewest", lambda row: shown(row, "to_first", two_digits)),
    ("/ dense", lambda row: shown(row, "to_dense", two_digits)),
    ("passes", lambda row: shown(row, "passes_share", percent)),
    ("optimizer", lambda row: shown(row, "optimizer_share", percent)),
    ("set-up", lambda row: shown(row, "setup_share", percent)),
    ("adapters MiB", lambda row: whole(row["adapter_mib"])),
    ("optimizer MiB", lambda row: whole(row["optimizer_mib"])),
    ("peak MiB", lambda row: whole(row["peak_mib"])),
]


ABOUT = (
    "A local step of FFT-MoE with pools of adapter experts of several sizes, eight clients in flight. The floor is "
    "the forward and backward pass of the dense foundation alone. Peaks are measured once."
)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64, 256], help="pool sizes per layer")
    parser.add_argument("--steps", type=int, default=4, help="local steps per client in a timed wave")
    parser.add_argument("--rounds", type=int, default=3, help="alternating repeats; medians are reported")
    parser.add_argument("--clients", type=int, default=8, help="clients in flight")
    parser.add_argument("--sequences", type=int, default=4, help="sequences per client and step")
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--bitwise", action="store_true", help="one client per pass, as reproducible=bitwise runs them")
    add_seed(parser)


def run(args: argparse.Namespace, note: Note) -> list[Row]:
    names = ("steps", "clients", "sequences", "length", "seed", "bitwise")
    workload = pool_workload.PoolWorkload(**{name: getattr(args, name) for name in names})
    return pool.run_pool(args.experts, workload, args.rounds, note)


def show(rows: list[Row]) -> Table:
    """Pool sizes: a step of all clients against the smallest pool and the foundation alone, its parts, and memory."""
    return with_notes(Table.of(rows, COLUMNS))


COMMAND = Command("experts", "a client step with few and with many adapter experts (FFT-MoE)", options, run, show, about=ABOUT)
