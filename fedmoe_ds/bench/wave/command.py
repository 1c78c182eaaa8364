"""`launch/bench.py wave`: the same clients, model, data and steps through every system."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from fedmoe_ds.bench.harness.command import SEED, Command, Note, option, values_of
from fedmoe_ds.bench.harness.repeats import shown
from fedmoe_ds.bench.harness.system import PEER_PREFIX, system_names
from fedmoe_ds.bench.harness.table import Column, Row, percent, two_digits, whole
from fedmoe_ds.bench.harness.workload import make_workloads
from fedmoe_ds.bench.wave.measure import run_wave
from fedmoe_ds.errors import UserError

COLUMNS: list[Column] = [
    ("shape", lambda row: row["shape"]),
    ("tokens", lambda row: str(row["sequences"] * row["length"])),
    ("system", lambda row: row["system"]),
    ("tokens/s", lambda row: shown(row, "tokens_per_s", whole)),
    ("time / ours", lambda row: shown(row, "ratio", two_digits)),
    ("CPU / ours", lambda row: shown(row, "cpu_ratio", two_digits)),
    ("peak MiB", lambda row: whole(row["peak_mib"])),
    ("floor share", lambda row: shown(row, "floor_share", percent)),
]

ABOUT = (
    "Eight clients train LoRA on experts and attention of a random OLMoE-shaped model: here together in one wave, "
    "with transformers and PEFT one client after the other. The floor is the wave's own matrix products, each one "
    "call of torch.mm into memory that is there already; kernels of our own may be faster than that. *Tokens* are those of "
    "one client in one step: a peer pays much of its price per step, so ratios depend on them. Peaks are measured once."
)


OPTIONS = (
    option("--shape", ["e32", "e64"], "e32, e64, olmoe-7b, tiny, or dense: plain LoRA on a Llama (default: e32 e64)"),
    option("--steps", 2, "local steps per client in a timed wave"),
    option("--rounds", 5, "alternating repeats; medians are reported"),
    option("--mode", None, "ours: fast, bitwise or both (default: both; on a GPU fast alone)"),
    option("--peers", ["eager", "grouped_mm"], "experts implementations of transformers", nargs="*"),
    option("--sequences", [1], "sequences per client and step, one or several"),
    option("--length", 128, "tokens per sequence"),
    option("--dtype", "float32", "of the frozen weights: float32 or bfloat16"),
    option("--device", "cpu", "cpu or cuda"),
    option("--kernels", "auto", "of our adapters' products, as execution.adapter_kernels"),
    SEED,
)


def run(args: argparse.Namespace, note: Note) -> list[Row]:
    settings = values_of(args, "steps", "sequences", "length", "seed", "dtype", "device", "kernels")
    if args.device == "cuda" and args.mode not in (None, "fast"):
        raise UserError(f"--mode: {args.mode}: bitwise is measured on CPUs alone; use fast")
    mode = args.mode or ("both" if args.device == "cpu" else "fast")
    return run_wave(make_workloads(args.shape, dense=True, **settings), system_names(mode, args.peers), args.rounds, note)


def lines(rows: list[Row]) -> Iterator[str]:
    """What has multiplied frozen weights; and for every workload, how many times the best peer we are."""
    # Results of earlier versions do not say it.
    for processor in dict.fromkeys(row["processor"] for row in rows if "processor" in row):
        yield f"Our products with frozen weights: matrix.cpp for {processor}."
    for shape, tokens in dict.fromkeys((row["shape"], row["sequences"] * row["length"]) for row in rows):
        mine = [row for row in rows if (row["shape"], row["sequences"] * row["length"]) == (shape, tokens)]
        peers = [row for row in mine if row["system"].startswith(PEER_PREFIX)]
        if peers:
            best = max(peers, key=lambda row: row["tokens_per_s"])
            times = f"{shown(best, 'ratio', two_digits)} times as fast as {best['system']}"
            yield f"{shape}, {tokens} tokens per client and step: {mine[0]['system']} runs {times}"


HELP = "the same clients, model, data and steps through every system"
COMMAND = Command("wave", HELP, OPTIONS, run, COLUMNS, lines=lines, about=ABOUT)
