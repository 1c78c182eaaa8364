"""`launch/bench.py calibrate`: measure this machine for `launch/plan.py --hardware FILE`."""

from __future__ import annotations

import argparse
from typing import Any

from fedmoe_ds.bench.calibration.measure import calibrate
from fedmoe_ds.bench.harness.command import Command, Note
from fedmoe_ds.bench.harness.table import Row, Table
from fedmoe_ds.planner import Hardware

ABOUT = "What this machine does per second, for predictions of the planner."


def options(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def run(args: argparse.Namespace, note: Note) -> list[Row]:
    return [calibrate(note).model_dump(mode="json")]


def show(rows: list[Row]) -> Table:
    """A calibration in a few lines."""
    hardware = Hardware.model_validate(rows[0])
    compute, tokens, sums = hardware.compute, hardware.network.all_to_all.intra, hardware.network.all_reduce.intra
    cells = [
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
    return Table(["this machine", "measured"], cells)


def stored(rows: list[Row]) -> Any:
    """The calibration itself: a file that `launch/plan.py --hardware` reads."""
    return rows[0]


COMMAND = Command(
    "calibrate", "measure this machine for launch/plan.py --hardware FILE", options, run, show, stored, about=ABOUT
)
