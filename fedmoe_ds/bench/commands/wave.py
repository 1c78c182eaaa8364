"""`launch/bench.py wave`: the same clients, model, data and steps through every system."""

from __future__ import annotations

import argparse

from fedmoe_ds.bench import wave
from fedmoe_ds.bench.command import Command, Note, add_seed
from fedmoe_ds.bench.system import PEER_PREFIX
from fedmoe_ds.bench.table import Column, Row, Table, percent
from fedmoe_ds.errors import UserError

COLUMNS: list[Column] = [
    ("shape", lambda row: row["shape"]),
    ("system", lambda row: row["system"]),
    ("tokens/s", lambda row: f"{row['tokens_per_s']:.0f}"),
    ("time / ours", lambda row: f"{row['ratio']:.2f}"),
    ("CPU / ours", lambda row: f"{row['cpu_ratio']:.2f}"),
    ("peak MiB", lambda row: f"{row['peak_mib']:.0f}"),
    ("floor share", lambda row: percent(row["floor_share"])),
]


ABOUT = (
    "Eight clients train LoRA on experts and attention of a random OLMoE-shaped model: here together in one wave, "
    "with transformers and PEFT one client after the other. The floor is the wave's own matrix products, each one "
    "call of torch.mm into memory that is there already; kernels of our own may be faster than that."
)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", nargs="+", default=["e32", "e64"], help="e32, e64, olmoe-7b or tiny (default: e32 e64)")
    parser.add_argument("--steps", type=int, default=2, help="local steps per client in a timed wave")
    parser.add_argument("--rounds", type=int, default=5, help="alternating repeats; medians are reported")
    parser.add_argument("--mode", help="ours: fast, bitwise or both (default: both; on a GPU fast alone)")
    parser.add_argument("--peers", nargs="*", default=["eager", "grouped_mm"], help="experts implementations of transformers")
    parser.add_argument("--sequences", type=int, default=1, help="sequences per client and step")
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
    """Systems by shape, and for every shape how many times the best peer we are."""
    lines = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        mine = [row for row in rows if row["shape"] == shape]
        peers = [row for row in mine if row["system"].startswith(PEER_PREFIX)]
        if peers:
            best = max(peers, key=lambda row: row["tokens_per_s"])
            lines.append(f"{shape}: {mine[0]['system']} runs {best['ratio']:.2f} times as fast as {best['system']}")
    return Table.of(rows, COLUMNS, lines)


COMMAND = Command("wave", "the same clients, model, data and steps through every system", options, run, show, about=ABOUT)
