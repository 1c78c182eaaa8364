"""`launch/bench.py peers`: the same federation in Flower's simulation engine, the same layers by DeepSpeed's own MoE."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from fedmoe_ds.bench.baselines import federated, layers
from fedmoe_ds.bench.harness.checks import check_known, check_least
from fedmoe_ds.bench.harness.command import SEED, Command, Note, option, values_of
from fedmoe_ds.bench.harness.repeats import shown
from fedmoe_ds.bench.harness.system import system_names
from fedmoe_ds.bench.harness.table import Column, Row, percent, two_digits, whole
from fedmoe_ds.bench.harness.workload import make_workloads

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
OPTIONS = (
    option("--systems", list(SYSTEMS), "flower, deepspeed (default: both)"),
    option("--shape", ["e32", "e64"], "e32, e64 or tiny (default: e32 e64)"),
    option("--steps", 2, "local steps per client and round"),
    option("--rounds", 5, "alternating timed rounds; medians are reported"),
    option("--mode", "both", "our rounds: fast, bitwise or both"),
    option("--sequences", 1, "sequences per client and step"),
    option("--length", 128, "tokens per sequence"),
    SEED,
)


def run(args: argparse.Namespace, note: Note) -> list[Row]:
    check_known("--systems", "system", args.systems, SYSTEMS)
    check_least("--rounds", args.rounds)
    ours = system_names(args.mode, [])
    workloads = make_workloads(args.shape, [args.sequences], **values_of(args, "steps", "length", "seed"))
    rows: list[Row] = []
    if "flower" in args.systems:
        rows += federated.run_federations(workloads, ours, args.rounds, note)
    if "deepspeed" in args.systems:
        rows += layers.run_layers(workloads, args.rounds, note)
    return rows


def lines(rows: list[Row]) -> Iterator[str]:
    """How many times the peer we are."""
    for row in rows:
        if row["system"] in (federated.FLOWER, layers.DEEPSPEED):
            ours = next(mine for mine in rows if (mine["part"], mine["shape"]) == (row["part"], row["shape"]))
            times = f"{shown(row, 'ratio', two_digits)} times as fast as {row['system']}"
            yield f"{row['shape']}, {row['part']}: {ours['system']} is {times}"
        if row["part"] == layers.PART and row["system"] == layers.DEEPSPEED:
            yield (
                f"{row['shape']}: {row['system']} pads the rows of every expert to those of the busiest one, "
                f"{row['padding']:.2f} times what is routed; with k = 1 it does not scale the weight to one"
            )


COMMAND = Command(
    "peers",
    "the same federation in Flower's simulation engine; the same layers by DeepSpeed's MoE",
    OPTIONS,
    run,
    COLUMNS,
    lines=lines,
    about=(
        "Rounds: eight clients with the caps 8, 8, 4, 4, 2, 2, 1, 1, all of them in every round, the mean of their adapters, "
        "no evaluation; one process with one thread per core, start-up and two warm-up rounds left out. Flower's clients are "
        "the fastest PEFT of `wave`. Layers: the expert layers alone, one forward and backward of all clients on one core. "
        "Peaks are measured once."
    ),
)
