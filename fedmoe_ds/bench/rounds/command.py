"""`launch/bench.py round`: where the time of whole rounds goes, and what being federated costs, part by part."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace

from fedmoe_ds.bench.harness.checks import check_known, check_least
from fedmoe_ds.bench.harness.command import SEED, Command, Note, option, values_of
from fedmoe_ds.bench.harness.process import scratch_folder
from fedmoe_ds.bench.harness.repeats import decide, run_of, shown
from fedmoe_ds.bench.harness.shapes import find_shape, write_model
from fedmoe_ds.bench.harness.table import Row, Table, one_decimal, two_digits
from fedmoe_ds.bench.harness.workload import Workload, make_workloads
from fedmoe_ds.bench.rounds import budget, overhead, shares, weak
from fedmoe_ds.bench.rounds.jobs import PHASES, RoundJobs, RoundWorkload

PARTS = (shares.PART, overhead.PART, budget.PART, weak.PART)
WORDS = ("part", "shape", "system", "figure")
HEADER = [*WORDS, "value", "with evaluation", "target", "met"]
ABOUT = (
    "Whole rounds of real runs of launch/train.py, from one round event of metrics.jsonl to the next, without the first. The "
    "floor of a round is its passes and optimizer steps; that of a federated run is a centralised one of the same tokens. "
    "*Value* leaves evaluation out, which is a setting; *with evaluation* has the shares of a round with the default one."
)
OPTIONS = (
    option("--parts", list(PARTS), "what to measure (default: all)"),
    option("--shape", "e32", "of the runs: e32, e64 or tiny"),
    option("--clients", 8, "clients of the federation on one rank"),
    option("--steps", 20, "local steps per client and round"),
    option("--sequences", 1, "sequences per client and step"),
    option("--length", 128, "tokens per sequence"),
    option("--rounds", 4, "timed rounds of a run, waves in part k; medians are reported"),
    option("--repeats", 3, "part overhead: alternating runs of every system, one timed round each"),
    # Fewer steps to a round make what is paid once per round weigh more, never less.
    option("--overhead-steps", 10, "part overhead: local steps per client and round"),
    option("--k-shape", ["e32", "e64"], "shapes of part k"),
    option("--k-sequences", [1, 4], "sequences per client and step in part k"),
    option("--k-steps", 5, "steps of a wave in part k"),
    SEED,
)


def run(args: argparse.Namespace, note: Note) -> list[Row]:
    check_known("--parts", "part", args.parts, PARTS)
    for name in ("overhead_steps", "k_steps", "k_sequences"):
        check_least(f"--{name.replace('_', '-')}", getattr(args, name))
    settings = values_of(args, "length", "seed")
    load = RoundWorkload(find_shape(args.shape), **values_of(args, "clients", "steps", "sequences", "rounds"), **settings)
    waves = make_workloads(args.k_shape, args.k_sequences, steps=args.k_steps, **settings)
    short = replace(load, steps=args.overhead_steps, rounds=1)
    rows = run_rounds(load, short, args.parts, args.repeats, note)
    return rows + (run_budget(waves, args.rounds, note) if budget.PART in args.parts else [])


def run_rounds(load: RoundWorkload, short: RoundWorkload, parts: list[str], repeats: int, note: Note) -> list[Row]:
    """The parts that are made of real runs, on one model; `short` is the workload of part overhead.

    Raises:
        UserError: no repeats.
        DisagreementError: losses of systems differ.
    """
    check_least("--repeats", repeats)
    rows: list[Row] = []
    if not set(parts) - {budget.PART}:
        return rows
    with scratch_folder("fedmoe-round-") as folder:
        note(f"{load.shape.name}: writing the model")
        jobs = RoundJobs.prepare(load, folder)
        if shares.PART in parts:
            rows += shares.measure_shares(jobs, note)
        if overhead.PART in parts:
            rows += overhead.measure_overhead(replace(jobs, load=replace(short, shape=jobs.load.shape)), repeats, note)
        if weak.PART in parts:
            rows += weak.measure_weak(jobs, note)
    return rows


def run_budget(loads: list[Workload], rounds: int, note: Note) -> list[Row]:
    """The part about k, for workloads of any shapes; those of one shape share its model."""
    rows: list[Row] = []
    for shape in dict.fromkeys(load.shape for load in loads):
        mine = [load for load in loads if load.shape == shape]
        with scratch_folder("fedmoe-round-") as folder:
            write_model(shape, mine[0].seed, folder)
            rows += budget.measure_budget(mine, folder, rounds, note)
    return rows


def table(rows: list[Row]) -> Table:
    """One line per figure; below the shares of a round, those of its phases."""
    cells = []
    for row in rows:
        cells.append(_cells(row))
        if row["part"] == shares.PART:
            cells += [_phase(row, name) for name in PHASES]
    return Table(HEADER, cells, [line for row in rows for line in _lines(row)], WORDS)


def _cells(row: Row) -> list[str]:
    of_shares = row["part"] == shares.PART
    evaluation = shown(row, "with_evaluation", one_decimal) if of_shares else ""
    value = two_digits(1.0) if _is_base(row) else shown(row, "value", one_decimal if of_shares else two_digits)
    met = "" if row["target"] is None else decide([run_of(row, "value")], lambda value: _reached(row, value))
    return [*[row[name] for name in WORDS], value, evaluation, _target(row), met]


def _is_base(row: Row) -> bool:
    """What the others are compared with: its ratio is one by definition."""
    return bool(row["system"] == weak.ALONE or row.get("against") == row["system"])


def _reached(row: Row, value: float) -> bool:
    if row["part"] == budget.PART:
        return abs(value - 1.0) <= budget.TOLERANCE
    limit = float(row["target"])
    if row["part"] == weak.PART:
        return value >= limit
    return value <= limit


def _target(row: Row) -> str:
    if row["target"] is None:
        return ""
    if row["part"] == budget.PART:
        return f"1 +- {budget.TOLERANCE:.2f}"
    form = one_decimal if row["part"] == shares.PART else two_digits
    return f"{'>=' if row['part'] == weak.PART else '<='} {form(row['target'])}"


def _phase(row: Row, name: str) -> list[str]:
    """One phase of a round; without evaluation, evaluation has no share."""
    cells = []
    for figure, samples in (
        ("shares_without_evaluation", "phase_samples"),
        ("shares", "phase_samples_with_evaluation"),
    ):
        found = {"value": row[figure][name], "samples": {"value": row.get(samples, {}).get(name)}}
        cells.append(shown(found, "value", one_decimal))
    without = "" if name == "evaluate" else cells[0]
    return [row["part"], row["shape"], row["system"], shares.NAMES[name], without, cells[1], "", ""]


def _lines(row: Row) -> Iterator[str]:
    """Sentences about a row: the absolute figures behind its ratio."""
    head = f"{row['shape']}: {row['system']}"
    if row["part"] == shares.PART:
        yield (
            f"{head}: a round of {row['clients']} clients x {row['steps']} steps takes {row['round_s']:.2f} s, "
            f"{one_decimal(row['shares']['evaluate'])} of it evaluation, which is left out of the shares beside it"
        )
    if row["part"] == budget.PART:
        where = f"{row['shape']}: {row['sequences']} x {row['length']} tokens"
        times = shown(row, "time_ratio", two_digits)
        yield f"{where}: k 1 takes {times} of the time of k {row['top_k']}, {row['flops_ratio']:.2f} of its FLOPs"
    if "of_machine" in row:
        yield f"{head}: {row['of_machine']:.2f} of what the machine has for two processes"


HELP = "where the time of whole rounds goes, and what being federated costs"
COMMAND = Command("round", HELP, OPTIONS, run, table=table, about=ABOUT)
