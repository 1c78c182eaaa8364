"""`launch/bench.py wave`: the same clients, model, data and steps through every system."""

from __future__ import annotations

import argparse

from fedmoe_ds.bench.harness.command import Command, Note, add_seed
from fedmoe_ds.bench.harness.repeats import shown, with_notes
from fedmoe_ds.bench.harness.system import PEER_PREFIX
from fedmoe_ds.bench.harness.table import Column, Row, Table, percent, two_digits, whole
from fedmoe_ds.bench.wave import measure as wave
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


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", nargs="+", default=["e32", "e64"], help="e32, e64, olmoe-7b or tiny (default: e32 e64)")
    parser.add_argument("--steps", type=int, default=2, help="local steps per client in a timed wave")
    parser.add_argument("--rounds", type=int, default=5, help="alternating repeats; medians are reported")
    parser.add_argument("--mode", help="ours: fast, bitwise or both (default: both; on a GPU fast alone)")
    parser.add_argument("--peers", nargs="*", default=["eager", "grouped_mm"], help="experts implementations of transformers")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1], help="sequences per client and step, one or several")
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--dtype", default="float32", help="of the frozen weights: float32 or bfloat16")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--kernels", default="auto", help="of our adapters' products, as execution.adapter_kernels")
    add_seed(parser)


def run(args: argparse.Namespace, note: Note) -> list[Row]:
    names = ("steps", "sequences", "length", "seed", "dtype", "device", "kernels")
    settings = {name: getattr(args, name) for name in names}
    if args.device == "cuda" and args.mode not in (None, "fast"):
        raise UserError(f"--mode: {args.mode}: bitwise is measured on CPUs alone; use fast")
    mode = args.mode or ("both" if args.device == "cpu" else "fast")
    workloads = wave.make_workloads(args.shape, **settings)
    return wave.run_wave(workloads, wave.system_names(mode, args.peers), args.rounds, note)


def show(rows: list[Row]) -> Table:
    """Systems by workload, and for every workload how many times the best peer we are."""
    lines = []
    for shape, tokens in dict.fromkeys((row["shape"], row["sequences"] * row["length"]) for row in rows):
        mine = [row for row in rows if (row["shape"], row["sequences"] * row["length"]) == (shape, tokens)]
        peers = [row for row in mine if row["system"].startswith(PEER_PREFIX)]
        if peers:
            best = max(peers, key=lambda row: row["tokens_per_s"])
            times = f"{shown(best, 'ratio', two_digits)} times as fast as {best['system']}"
            lines.append(f"{shape}, {tokens} tokens per client and step: {mine[0]['system']} runs {times}")
    return with_notes(Table.of(rows, COLUMNS, lines))


COMMAND = Command("wave", "the same clients, model, data and steps through every system", options, run, show, about=ABOUT)
