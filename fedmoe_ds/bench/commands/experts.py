"""`launch/bench.py experts`: a client step with few and with many adapter experts (FFT-MoE)."""

from __future__ import annotations

import argparse

from fedmoe_ds.bench import pool, pool_workload
from fedmoe_ds.bench.command import Command, Note, add_seed
from fedmoe_ds.bench.table import Column, Row, Table, percent, whole

COLUMNS: list[Column] = [
    ("system", lambda row: row["system"]),
    ("ms / step", lambda row: f"{1000 * row['step_seconds']:.0f}"),
    ("/ fewest", lambda row: f"{row['to_first']:.2f}"),
    ("/ dense", lambda row: f"{row['to_dense']:.2f}"),
    ("passes", lambda row: percent(row["passes_share"])),
    ("optimizer", lambda row: percent(row["optimizer_share"])),
    ("set-up", lambda row: percent(row["setup_share"])),
    ("adapters MiB", lambda row: whole(row["adapter_mib"])),
    ("optimizer MiB", lambda row: whole(row["optimizer_mib"])),
    ("peak MiB", lambda row: whole(row["peak_mib"])),
]


ABOUT = (
    "A local step of FFT-MoE with pools of adapter experts of several sizes, eight clients in flight. The floor is "
    "the forward and backward pass of the dense foundation alone."
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
    return Table.of(rows, COLUMNS)


COMMAND = Command("experts", "a client step with few and with many adapter experts (FFT-MoE)", options, run, show, about=ABOUT)
