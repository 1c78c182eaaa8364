"""`launch/bench.py gpu`: everything that one short visit to a machine with a GPU should measure."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fedmoe_ds.bench.gpu.steps import STEPS
from fedmoe_ds.bench.gpu.visit import DOCUMENT, LEAST_S, LINES, visit
from fedmoe_ds.bench.harness.checks import check_known, check_least, check_seed
from fedmoe_ds.bench.harness.command import SEED, Command, Note, command_line, option
from fedmoe_ds.bench.harness.shapes import find_shape
from fedmoe_ds.bench.harness.table import Row, Table
from fedmoe_ds.errors import UserError
from fedmoe_ds.report import formats

OUTPUT = Path("gpu-results")
SHAPE = "olmoe-7b"
TOTAL_S = int(sum(step.limit_s for step in STEPS.values()))

OPTIONS = (
    option("--steps", list(STEPS), f"some of: {', '.join(STEPS)} (default: all)", metavar="STEP"),
    option("--output", OUTPUT, f"folder of the results; made where missing (default: {OUTPUT})", metavar="FOLDER"),
    option("--shape", SHAPE, "of the model: olmoe-7b; tiny goes through everything, and its figures mean nothing"),
    option("--limit", TOTAL_S, f"seconds for all steps together (default: {TOTAL_S})"),
    SEED,
)


def run(args: argparse.Namespace, note: Note) -> list[Row]:
    """One row per step. Raises UserError before the first one: no device, an unknown step, no folder for results."""
    check_known("--steps", "step", args.steps, STEPS)
    check_least("--limit", args.limit, LEAST_S)
    check_seed(args.seed)
    find_shape(args.shape)
    check_device()
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: {args.output}: cannot be made: {error.strerror or error}; give another folder") from None
    if not os.access(args.output, os.W_OK):
        raise UserError(f"--output: {args.output}: cannot be written; give another folder")
    note(f"{args.output}: {LINES} gets a line per step as it ends, {DOCUMENT} and gpu-wave-*.json are for docs/performance/")
    return visit(args.shape, args.steps, args.output.resolve(), args.limit, args.seed, _command(args))


def check_device() -> None:
    """Raises UserError where there is no GPU to measure."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        raise UserError("gpu: DS_ACCELERATOR=cpu says to leave GPUs alone; unset it, or measure the CPU: launch/bench.py all")
    if not torch.cuda.is_available():
        build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        raise UserError(
            f"gpu: no CUDA device is visible to torch {torch.__version__}, a build {build}; run it where a GPU is, "
            "or measure the CPU: launch/bench.py all"
        )


def _command(args: argparse.Namespace) -> str:
    """What to type to measure again."""
    words = ["gpu", *(["--steps", *args.steps] if set(args.steps) != set(STEPS) else [])]
    words += ["--shape", args.shape] if args.shape != SHAPE else []
    return command_line([*words, *(["--seed", str(args.seed)] if args.seed else [])])


def table(rows: list[Row]) -> Table:
    """What each step has found, a line for each time that it told something."""
    return Table(["step", "seconds", "found"], [cells for row in rows for cells in _cells(row)], words=("step", "found"))


def _cells(row: Row) -> Iterator[list[str]]:
    told = [", ".join(f"{name} {_shown(value)}" for name, value in facts.items()) for facts in row["found"]]
    told += [] if row["error"] is None else [f"failed: {row['error']}"]
    first = (row["step"], formats.number(row["seconds"]))
    for place, words in enumerate(told or ["nothing to tell"]):
        yield [*(first if place == 0 else ("", "")), words]


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return formats.number(value)
    if isinstance(value, list):
        return " / ".join(map(_shown, value)) if value else "none"
    return "none" if value is None else str(value)


def code(rows: list[Row]) -> int:
    """1 where a step has failed."""
    return 1 if any(row["error"] is not None for row in rows) else 0


ABOUT = (
    "One visit to a machine with a GPU, in eight minutes: what is there, the tests that need a device, the quickstart, the "
    "device's ceilings, torch's grouped kernel at its edges, one step of eight clients of OLMoE-1B-7B (random weights) beside "
    "PEFT, memory beside the plan, a profile, NCCL in a world of one. Each step is a process of its own with a limit; one that "
    "fails is a line here."
)
HELP = "one visit to a machine with a GPU: correctness, speed, memory and a profile in eight minutes"
COMMAND = Command("gpu", HELP, OPTIONS, run, table=table, about=ABOUT, code=code)
