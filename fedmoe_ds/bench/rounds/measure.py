"""Rounds: where the time of whole rounds goes, and what being federated costs, part by part."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fedmoe_ds.bench.harness.shapes import write_model
from fedmoe_ds.bench.harness.table import Row
from fedmoe_ds.bench.harness.workload import Workload
from fedmoe_ds.bench.rounds import budget as round_budget
from fedmoe_ds.bench.rounds import overhead as round_overhead
from fedmoe_ds.bench.rounds import shares as round_shares
from fedmoe_ds.bench.rounds import weak as round_weak
from fedmoe_ds.bench.rounds.jobs import RoundJobs, RoundWorkload
from fedmoe_ds.errors import UserError, nearest

PARTS = (round_shares.PART, round_overhead.PART, round_budget.PART, round_weak.PART)

Note = Callable[[str], None]


def check_parts(parts: list[str]) -> None:
    """Raises UserError for a part that there is not."""
    for part in parts:
        if part not in PARTS:
            raise UserError(f"--parts: {part}: unknown part{nearest(part, PARTS)}; use {', '.join(PARTS)}")


def run_rounds(load: RoundWorkload, short: RoundWorkload, parts: list[str], repeats: int, note: Note) -> list[Row]:
    """The parts that are made of real runs, on one model; `short` is the workload of part overhead.

    Raises:
        UserError: no repeats.
        DisagreementError: losses of systems differ.
    """
    if repeats < 1:
        raise UserError(f"--repeats: {repeats}: too small; use 1 or more")
    rows: list[Row] = []
    if not set(parts) - {round_budget.PART}:
        return rows
    with tempfile.TemporaryDirectory(prefix="fedmoe-round-") as folder:
        note(f"{load.shape.name}: writing the model")
        jobs = RoundJobs.prepare(load, Path(folder))
        if round_shares.PART in parts:
            rows += round_shares.measure_shares(jobs, note)
        if round_overhead.PART in parts:
            rows += round_overhead.measure_overhead(replace(jobs, load=replace(short, shape=jobs.load.shape)), repeats, note)
        if round_weak.PART in parts:
            rows += round_weak.measure_weak(jobs, note)
    return rows


def run_budget(loads: list[Workload], rounds: int, note: Note) -> list[Row]:
    """The part about k, for workloads of any shapes; those of one shape share its model."""
    rows: list[Row] = []
    for shape in dict.fromkeys(load.shape for load in loads):
        mine = [load for load in loads if load.shape == shape]
        with tempfile.TemporaryDirectory(prefix="fedmoe-round-") as folder:
            write_model(shape, mine[0].seed, Path(folder))
            rows += round_budget.measure_budget(mine, Path(folder), rounds, note)
    return rows
