"""`launch/bench.py round`: where the time of whole rounds goes, and what being federated costs."""

from __future__ import annotations

import argparse
from dataclasses import replace

from fedmoe_ds.bench.harness.command import Command, Note, add_seed
from fedmoe_ds.bench.harness.repeats import decide, run_of, shown, with_notes
from fedmoe_ds.bench.harness.shapes import find_shape
from fedmoe_ds.bench.harness.table import Row, Table, two_digits
from fedmoe_ds.bench.harness.workload import Workload
from fedmoe_ds.bench.rounds import budget as round_budget
from fedmoe_ds.bench.rounds import measure as rounds
from fedmoe_ds.bench.rounds import shares as round_shares
from fedmoe_ds.bench.rounds import weak as round_weak
from fedmoe_ds.bench.rounds.jobs import PHASES, RoundWorkload
from fedmoe_ds.errors import UserError

WORDS = ("part", "shape", "system", "figure")
HEADER = [*WORDS, "value", "with evaluation", "target", "met"]


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parts", nargs="+", default=list(rounds.PARTS), help="what to measure (default: all)")
    parser.add_argument("--shape", default="e32", help="of the runs: e32, e64 or tiny")
    parser.add_argument("--clients", type=int, default=8, help="clients of the federation on one rank")
    parser.add_argument("--steps", type=int, default=20, help="local steps per client and round")
    parser.add_argument("--sequences", type=int, default=1, help="sequences per client and step")
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--rounds", type=int, default=4, help="timed rounds of a run, waves in part k; medians are reported")
    parser.add_argument(
        "--repeats", type=int, default=3, help="part overhead: alternating runs of every system, one timed round each"
    )
    # Fewer steps to a round make what is paid once per round weigh more, never less.
    parser.add_argument("--overhead-steps", type=int, default=10, help="part overhead: local steps per client and round")
    parser.add_argument("--k-shape", nargs="+", default=["e32", "e64"], help="shapes of part k")
    parser.add_argument("--k-sequences", type=int, nargs="+", default=[1, 4], help="sequences per client and step in part k")
    parser.add_argument("--k-steps", type=int, default=5, help="steps of a wave in part k")
    add_seed(parser)


def run(args: argparse.Namespace, note: Note) -> list[Row]:
    rounds.check_parts(args.parts)
    for name in ("overhead_steps", "k_steps", "k_sequences"):
        check_positive(f"--{name.replace('_', '-')}", getattr(args, name))
    settings = {name: getattr(args, name) for name in ("length", "seed")}
    names = ("clients", "steps", "sequences", "rounds")
    load = RoundWorkload(find_shape(args.shape), **{name: getattr(args, name) for name in names}, **settings)
    budgets = [
        Workload(find_shape(name), args.k_steps, count, **settings)
        for name in dict.fromkeys(args.k_shape)
        for count in dict.fromkeys(args.k_sequences)
    ]
    short = replace(load, steps=args.overhead_steps, rounds=1)
    rows = rounds.run_rounds(load, short, args.parts, args.repeats, note)
    return rows + (rounds.run_budget(budgets, args.rounds, note) if round_budget.PART in args.parts else [])


def check_positive(option: str, given: int | list[int]) -> None:
    """Raises UserError for a number below 1."""
    for number in given if isinstance(given, list) else [given]:
        if number < 1:
            raise UserError(f"{option}: {number}: too small; use 1 or more")


def show(rows: list[Row]) -> Table:
    """One line per figure; below the shares of a round, those of its phases."""
    cells = []
    for row in rows:
        cells.append(_cells(row))
        if row["part"] == round_shares.PART:
            cells += [_phase(row, name) for name in PHASES]
    return with_notes(Table(HEADER, cells, [line for row in rows for line in _lines(row)], WORDS))


def _cells(row: Row) -> list[str]:
    shares = row["part"] == round_shares.PART
    evaluation = shown(row, "with_evaluation", share) if shares else ""
    value = two_digits(1.0) if _is_base(row) else shown(row, "value", share if shares else two_digits)
    met = "" if row["target"] is None else decide([run_of(row, "value")], lambda value: _reached(row, value))
    return [*[row[name] for name in WORDS], value, evaluation, _target(row), met]


def _is_base(row: Row) -> bool:
    """What the others are compared with: its ratio is one by definition."""
    return bool(row["system"] == round_weak.ALONE or row.get("against") == row["system"])


def _reached(row: Row, value: float) -> bool:
    if row["part"] == round_budget.PART:
        return abs(value - 1.0) <= round_budget.TOLERANCE
    limit = float(row["target"])
    if row["part"] == round_weak.PART:
        return value >= limit
    return value <= limit


def _target(row: Row) -> str:
    if row["target"] is None:
        return ""
    if row["part"] == round_budget.PART:
        return f"1 +- {round_budget.TOLERANCE:.2f}"
    form = share if row["part"] == round_shares.PART else two_digits
    return f"{'>=' if row['part'] == round_weak.PART else '<='} {form(row['target'])}"


def _phase(row: Row, name: str) -> list[str]:
    """One phase of a round; without evaluation, evaluation has no share."""
    cells = []
    for shares, samples in (
        ("shares_without_evaluation", "phase_samples"),
        ("shares", "phase_samples_with_evaluation"),
    ):
        found = {"value": row[shares][name], "samples": {"value": row.get(samples, {}).get(name)}}
        cells.append(shown(found, "value", share))
    without = "" if name == "evaluate" else cells[0]
    return [row["part"], row["shape"], row["system"], round_shares.NAMES[name], without, cells[1], "", ""]


def _lines(row: Row) -> list[str]:
    """Sentences about a row: the absolute figures behind its ratio."""
    head = f"{row['shape']}: {row['system']}"
    if row["part"] == round_shares.PART:
        return [
            f"{head}: a round of {row['clients']} clients x {row['steps']} steps takes {row['round_s']:.2f} s, "
            f"{share(row['shares']['evaluate'])} of it evaluation, which is left out of the shares beside it"
        ]
    if row["part"] == round_budget.PART:
        where = f"{row['shape']}: {row['sequences']} x {row['length']} tokens"
        times = shown(row, "time_ratio", two_digits)
        return [f"{where}: k 1 takes {times} of the time of k {row['top_k']}, {row['flops_ratio']:.2f} of its FLOPs"]
    if "of_machine" in row:
        return [f"{head}: {row['of_machine']:.2f} of what the machine has for two processes"]
    return []


def share(value: float) -> str:
    """One digit more than in other tables: shares are small."""
    return f"{100 * value:.1f} %"


ABOUT = (
    "Whole rounds of real runs of launch/train.py, from one round event of metrics.jsonl to the next, without the first. The "
    "floor of a round is its passes and optimizer steps; that of a federated run is a centralised one of the same tokens. "
    "*Value* leaves evaluation out, which is a setting; *with evaluation* has the shares of a round with the default one."
)
COMMAND = Command(
    "round", "where the time of whole rounds goes, and what being federated costs", options, run, show, about=ABOUT
)
