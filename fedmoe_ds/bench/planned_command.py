"""Planned command: `launch/bench.py calibrate` and `launch/bench.py plan`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from fedmoe_ds.bench import table
from fedmoe_ds.bench.calibrate import calibrate
from fedmoe_ds.bench.planned import run_planned
from fedmoe_ds.bench.table import Row
from fedmoe_ds.errors import UserError
from fedmoe_ds.planner import Hardware, load_hardware
from fedmoe_ds.planner.text import aligned


def run(command: str, args: argparse.Namespace, note: Callable[[str], None]) -> str:
    """Run `calibrate` or `plan`; returns what standard output shows. Raises UserError for what the user can fix."""
    table.check_writable(args.json)
    if command == "calibrate":
        hardware = calibrate(note)
        text = hardware.model_dump_json(indent=1)
        if args.json is not None:
            write(args.json, text)
        return "\n".join(summary(hardware))
    hardware = calibrate(note) if args.hardware is None else load_hardware(args.hardware)
    rows = run_planned(args.case, args.ranks, args.rounds, hardware, note)
    if args.json is not None:
        table.write_json(rows, args.json)
    return "\n".join(comparison(rows))


def write(path: Path, text: str) -> None:
    """Store a calibration. Raises UserError when the file cannot be written."""
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json: {path}: cannot be written: {error.strerror or error}") from error


def summary(hardware: Hardware) -> list[str]:
    """A calibration in a few lines."""
    compute, tokens, sums = hardware.compute, hardware.network.all_to_all.intra, hardware.network.all_reduce.intra
    rows = [
        ["cores", f"{hardware.slots}"],
        ["matrix products, one core", f"{compute.flops_per_s['float32'] / 1e9:.1f} GFLOP/s"],
        ["elementwise work, one core", f"{compute.bytes_per_s / 1e9:.1f} GB/s"],
        ["a framework call", f"{compute.call_s * 1e6:.1f} us"],
        ["a group of a grouped product", f"{compute.group_s * 1e6:.1f} us"],
        ["several ranks at once / more than cores", f"x {compute.crowding:.2f} / x {compute.oversubscription:.2f}"],
        ["token all-to-all", f"{tokens.alpha_s * 1e6:.0f} us + {tokens.bytes_per_s / 1e9:.2f} GB/s"],
        ["all-reduce", f"{sums.alpha_s * 1e6:.0f} us + {sums.bytes_per_s / 1e9:.2f} GB/s"],
        ["a process before the run", f"{hardware.baseline_bytes / 2**20:.0f} MiB"],
        ["residual of the fit, passes (rms)", f"{100 * hardware.facts['pass_residual_rms']:.0f} %"],
    ]
    return aligned(["this machine", "measured"], rows)


def comparison(rows: list[Row]) -> list[str]:
    """Predicted beside measured."""
    cells = [
        [
            row["shape"],
            str(row["ranks"]),
            f"{row['clusters']} x {row['ep_size']}",
            f"{row['round_s']:.2f}",
            f"{row['predicted_round_s']:.2f}",
            f"{row['round_ratio']:.2f}",
            f"{row['peak_mib']:.0f}",
            f"{row['predicted_mib']:.0f}",
            f"{row['memory_ratio']:.2f}",
        ]
        for row in rows
    ]
    header = ["shape", "ranks", "clusters x ep", "round s", "predicted", "ratio", "peak MiB", "predicted", "ratio"]
    return aligned(header, cells)
