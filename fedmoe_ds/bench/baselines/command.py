"""`launch/bench.py peers`: the same federation in Flower's simulation engine, the same layers by DeepSpeed's own MoE."""

from __future__ import annotations

import argparse

from fedmoe_ds.bench.baselines import federated, layers
from fedmoe_ds.bench.harness.command import Command, Note, add_seed
from fedmoe_ds.bench.harness.repeats import shown, with_notes
from fedmoe_ds.bench.harness.table import Column, Row, Table, percent, two_digits, whole
from fedmoe_ds.bench.wave.measure import make_workloads, system_names
from fedmoe_ds.errors import UserError, nearest

SYSTEMS = ("flower", "deepspeed")
COLUMNS: list[Column] = [
    ("part", lambda row: row["part"]),
    ("shape", lambda row: row["shape"]),
    ("system", lambda row: row["system"]),
    ("rounds/h", lambda row: shown(row, "rounds_per_hour", whole) if row["part"] == federated.PART else ""),
    ("tokens/s", lambda row: shown(row, "tokens_per_s", whole)),
    ("time / ours", lambda row: shown(row, "ratio", two_digits)),
    ("peak MiB", lambda row: whole(row["peak_mib"])),
    ("cores in training", lambda row: shown(row, "training_share", percent) if row["part"] == federated.PART else ""),
]


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), help="flower, deepspeed (default: both)")
    parser.add_argument("--shape", nargs="+", default=["e32", "e64"], help="e32, e64 or tiny (default: e32 e64)")
    parser.add_argument("--steps", type=int, default=2, help="local steps per client and round")
    parser.add_argument("--rounds", type=int, default=5, help="alternating timed rounds; medians are reported")
    parser.add_argument("--mode", default="both", help="our rounds: fast, bitwise or both")
    parser.add_argument("--sequences", type=int, default=1, help="sequences per client and step")
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence")
    add_seed(parser)


def run(args: argparse.Namespace, note: Note) -> list[Row]:
    for name in args.systems:
        if name not in SYSTEMS:
            raise UserError(f"--systems: {name}: unknown system{nearest(name, SYSTEMS)}")
    if args.rounds < 1:
        raise UserError(f"--rounds: {args.rounds}: too small; use 1 or more")
    ours = system_names(args.mode, [])
    settings = {name: getattr(args, name) for name in ("steps", "length", "seed")}
    workloads = make_workloads(args.shape, [args.sequences], **settings)
    rows: list[Row] = []
    if "flower" in args.systems:
        rows += federated.run_federations(workloads, ours, args.rounds, note)
    if "deepspeed" in args.systems:
        rows += layers.run_layers(workloads, args.rounds, note)
    return rows


def show(rows: list[Row]) -> Table:
    """Rounds and layers by shape, and how many times the peer we are."""
    lines = []
    for row in rows:
        if row["system"] in (federated.FLOWER, layers.DEEPSPEED):
            ours = next(mine for mine in rows if (mine["part"], mine["shape"]) == (row["part"], row["shape"]))
            times = f"{shown(row, 'ratio', two_digits)} times as fast as {row['system']}"
            lines.append(f"{row['shape']}, {row['part']}: {ours['system']} is {times}")
        if row["part"] == layers.PART and row["system"] == layers.DEEPSPEED:
            lines.append(
                f"{row['shape']}: {row['system']} pads the rows of every expert to those of the busiest one, "
                f"{row['padding']:.2f} times what is routed; with k = 1 it does not scale the weight to one"
            )
    return with_notes(Table.of(rows, COLUMNS, lines))


COMMAND = Command(
    "peers",
    "the same federation in Flower's simulation engine; the same layers by DeepSpeed's MoE",
    options,
    run,
    show,
    about=(
        "Rounds: eight clients with the caps 8, 8, 4, 4, 2, 2, 1, 1, all of them in every round, the mean of their adapters, "
        "no evaluation; one process with one thread per core, start-up and two warm-up rounds left out. Flower's clients are "
        "the fastest PEFT of `wave`. Layers: the expert layers alone, one forward and backward of all clients on one core. "
        "Peaks are measured once."
    ),
)
