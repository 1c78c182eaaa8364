"""`launch/bench.py plan`: the planner's prediction beside a measurement of the same job on this machine.

Every case is the real command on 1, 2 or 4 ranks. Round time is the `seconds` of the round events, without start-up and without
the first round, which warms up; memory is the largest peak of a rank. The shapes are none of those that `calibrate` times.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmoe_ds.bench.calibration.command import calibrate
from fedmoe_ds.bench.harness.checks import check_known
from fedmoe_ds.bench.harness.command import Command, Note, option
from fedmoe_ds.bench.harness.jobs import Finished, run_job
from fedmoe_ds.bench.harness.process import scratch_folder
from fedmoe_ds.bench.harness.repeats import make_row
from fedmoe_ds.bench.harness.table import Column, Row, two_digits, whole
from fedmoe_ds.config import Config
from fedmoe_ds.errors import UserError
from fedmoe_ds.planner import Hardware, Job, Prediction, World, load_hardware, predict_job, resolve

COLUMNS: list[Column] = [
    ("shape", lambda row: row["shape"]),
    ("ranks", lambda row: str(row["ranks"])),
    ("clusters x ep", lambda row: f"{row['clusters']} x {row['ep_size']}"),
    ("round s", lambda row: two_digits(row["round_s"])),
    ("predicted", lambda row: two_digits(row["predicted_round_s"])),
    ("ratio", lambda row: two_digits(row["round_ratio"])),
    ("peak MiB", lambda row: whole(row["peak_mib"])),
    ("predicted", lambda row: whole(row["predicted_mib"])),
    ("ratio", lambda row: two_digits(row["memory_ratio"])),
]

ABOUT = (
    "Round time and memory of real runs beside what the planner predicted for them, after a calibration of this "
    "machine. There is no floor: a ratio of 1 is a perfect prediction."
)
OPTIONS = (
    option("--hardware", None, "a file of `calibrate`; default: calibrate first", type=Path),
    option("--ranks", [1, 2, 4], "numbers of ranks (default: 1 2 4)"),
    option("--case", ["short", "narrow", "long"], "shapes (default: all three)"),
    option("--rounds", 3, "rounds of every run; the first one warms up and is not compared"),
)


@dataclass(frozen=True)
class Case:
    """One shape; `ep_size` by number of ranks."""

    name: str
    tree: dict[str, Any]
    ep_size: dict[int, int]

    def config(self, output: str, ranks: int, rounds: int) -> dict[str, Any]:
        """The whole configuration, as a tree."""
        tree = {**self.tree, "name": f"{self.name}-{ranks}", "output": output, "topology": {"ep_size": self.ep_size[ranks]}}
        tree["federation"] = {**self.tree.get("federation", {}), "rounds": rounds}
        return tree


CASES = {
    case.name: case
    for case in (
        Case(
            "short",  # many clients, one cluster per rank or two
            {
                "foundation": {"preset": "tiny-olmoe", "pretrain": {"steps": 0}},
                "adapters": {"rank": 8},
                "local": {"max_steps": 4, "batch_size": 8},
                "data": {"sequence_length": 64, "max_samples": 40, "partition": {"clients": 12}},
                "evaluation": {"max_sequences": 32},
            },
            {1: 1, 2: 1, 4: 2},
        ),
        Case(
            "narrow",  # overheads and waves
            {
                "foundation": {"preset": "nano-olmoe", "pretrain": {"steps": 0}},
                "adapters": {"rank": 16, "attention": []},
                "local": {"max_steps": 8, "batch_size": 16},
                "data": {"sequence_length": 128, "max_samples": 96, "partition": {"clients": 10}},
                "execution": {"clients_in_flight": 4},
                "evaluation": {"max_sequences": 48},
            },
            {1: 1, 2: 2, 4: 2},
        ),
        Case(
            "long",  # one expert pool over all ranks
            {
                "foundation": {"preset": "tiny-olmoe", "pretrain": {"steps": 0}},
                "adapters": {"rank": 32, "attention": ["q_proj", "k_proj", "v_proj", "o_proj"]},
                "local": {"max_steps": 4, "batch_size": 4},
                "data": {"sequence_length": 256, "max_samples": 24, "partition": {"clients": 6}},
                "evaluation": {"max_sequences": 16},
            },
            {1: 1, 2: 2, 4: 4},
        ),
    )
}


def run(args: argparse.Namespace, note: Note) -> list[Row]:
    """One row per case and number of ranks: predicted and measured round time and memory, and their ratios.

    Raises:
        UserError: an unknown case or number of ranks, or a single round.
    """
    hardware = calibrate(note) if args.hardware is None else load_hardware(args.hardware)
    if args.rounds < 2:
        raise UserError(f"--rounds: {args.rounds}: the first round warms up and is not compared; use 2 or more")
    check_known("--case", "case", args.case, CASES)
    with scratch_folder("fedmoe-planned-") as folder:
        return [_row(CASES[name], count, args.rounds, hardware, folder, note) for name in args.case for count in args.ranks]


def _row(case: Case, ranks: int, rounds: int, hardware: Hardware, folder: Path, note: Note) -> Row:
    if ranks not in case.ep_size:
        raise UserError(f"--ranks: {ranks}: the cases are laid out for {', '.join(map(str, case.ep_size))} ranks")
    tree = case.config(str(folder / "runs"), ranks, rounds)
    note(f"{case.name} on {ranks} ranks: predicting")
    job = resolve(Config.model_validate(tree))  # also prepares the data, as a first start would
    predicted = predictions(job, ranks, rounds, hardware)
    note(f"{case.name} on {ranks} ranks: running")
    return compare(case, ranks, predicted, run_job(tree, folder, ranks))


def predictions(job: Job, ranks: int, rounds: int, hardware: Hardware) -> list[Prediction]:
    """Every round of a job on this machine."""
    config, world = job.config, World(1, ranks)
    flight = config.execution.clients_in_flight
    return [predict_job(job, config.topology.ep_size, flight, world, hardware, index) for index in range(1, rounds + 1)]


def compare(case: Case, ranks: int, predicted: list[Prediction], done: Finished) -> Row:
    """A row of the result."""
    measured, predicted = done.rounds()[1:], predicted[1:]  # the first round warms up: caches, kernels, page faults
    seconds = [event["seconds"] for event in measured]
    phases = {name: _mean(event["phases"].get(name, 0.0) for event in measured) for name in predicted[0].seconds}
    planned = {name: _mean(one.seconds[name] for one in predicted) for name in predicted[0].seconds}
    total, held = _mean(one.round_seconds for one in predicted), predicted[0].memory_total
    peak = max(done.peak.values())
    facts = {
        "ranks": ranks,
        "ep_size": case.ep_size[ranks],
        "clusters": ranks // case.ep_size[ranks],
        "rounds": len(measured),
        "round_s": _mean(seconds),
        "round_spread_s": statistics.pstdev(seconds),
        "predicted_round_s": total,
        "round_ratio": total / _mean(seconds),
        "peaks_mib": [done.peak[rank] / 2**20 for rank in sorted(done.peak)],
        "predicted_mib": held / 2**20,
        "memory_ratio": held / peak,
        "phases": phases,
        "predicted_phases": planned,
        "predicted_memory": predicted[0].memory,
        "predicted_train": predicted[0].train_split,
        "collectives": _sent(measured),
        "predicted_collectives": {
            name: {
                "calls": _mean(one.traffic[name].calls for one in predicted),
                "bytes": _mean(one.traffic[name].bytes for one in predicted),
            }
            for name in predicted[0].traffic
        },
    }
    return make_row(case.name, "planner", peak / 2**20, **facts)


CONTROL_CALLS = ("gather", "sum", "largest", "broadcast")
"""Names of the control plane's calls in a round's tallies; the planner has one for all of them."""


def _sent(rounds: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Calls and bytes of rank 0 in a round, by the planner's names of collectives."""
    found: dict[str, dict[str, float]] = {}
    for event in rounds:
        for name, tally in event["collectives"].items():
            entry = found.setdefault("control" if name in CONTROL_CALLS else name, {"calls": 0.0, "bytes": 0.0})
            for key in entry:
                entry[key] += tally[key] / len(rounds)
    return found


def _mean(values: Any) -> float:
    return statistics.fmean(values)


HELP = "predicted beside measured round time and memory of real runs"
COMMAND = Command("plan", HELP, OPTIONS, run, COLUMNS, about=ABOUT)
