"""Memory of rounds: resident memory of a real run after every round, sampled from outside.

The first rounds fill what a run keeps for its whole life: buffers, the heap that glibc is told to keep, modules imported late.
From `SETTLED` on, memory is flat or it leaks.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from fedmoe_ds.bench.harness.command import Note
from fedmoe_ds.bench.harness.jobs import metrics_file, run_job
from fedmoe_ds.bench.harness.process import scratch_folder
from fedmoe_ds.bench.harness.repeats import make_row
from fedmoe_ds.bench.harness.system import OURS
from fedmoe_ds.bench.harness.table import Row
from fedmoe_ds.bench.memory.clients import slope
from fedmoe_ds.errors import UserError

PART = "rounds"
SETTLED = 20
"""Rounds after which memory has to be flat."""
FLAT_SHARE, FLAT_MIB = 0.01, 5.0
PRESET = "nano-olmoe"
_CHECKPOINTS = 4
_LOOK_S = 0.02  # less than a round takes: each one is seen
_LIMIT_S = 900.0


def check(rounds: int) -> None:
    """Raises UserError for a run that ends before its memory has settled."""
    if rounds < 2 * SETTLED:
        raise UserError(f"--rounds: {rounds}: memory settles in {SETTLED} of them; use {2 * SETTLED} or more")


def measure_rounds(rounds: int, seed: int, note: Note) -> list[Row]:
    """One row: resident memory after every round, its growth after the first ones, and whether that is flat."""
    note(f"{PRESET}: {rounds} rounds")
    with scratch_folder() as folder:
        samples = watch(tree(rounds, seed, str(folder)), folder)
    after = [mib for _, mib in samples]
    settled = [(number, mib) for number, mib in samples if number >= SETTLED]
    growth = after[-1] - settled[0][1]
    facts: Row = {
        "part": PART,
        "rounds": rounds,
        "settled_round": settled[0][0],
        "settled_mib": settled[0][1],
        "resident_mib": after[-1],
        "kib_per_round": 1024 * (slope(dict(settled)) or 0.0),
        "flat": is_flat(growth, settled[0][1]),
    }
    row = make_row(PRESET, OURS, max(after), **facts)
    return [{**row, "samples": [[number, round(mib, 2)] for number, mib in samples]}]


def is_flat(growth_mib: float, settled_mib: float) -> bool:
    """Less than one per cent, and less than five MiB."""
    return growth_mib < FLAT_SHARE * settled_mib and growth_mib < FLAT_MIB


def tree(rounds: int, seed: int, folder: str) -> dict[str, Any]:
    """Six clients of unequal data, all of them in every round, three tiers; four checkpoints; evaluated at both ends only."""
    return {
        "name": "rounds",
        "output": folder,
        "seed": seed,
        "foundation": {"preset": PRESET, "cache": folder, "pretrain": {"steps": 0}},
        "adapters": {"rank": 4},
        "federation": {"rounds": rounds},
        "local": {"max_steps": 2, "batch_size": 2},
        "data": {"sequence_length": 48, "max_samples": 8, "partition": {"kind": "natural", "clients": 6}},
        "evaluation": {"every": rounds, "max_sequences": 4, "client_sequences": 0},
        "checkpoint": {"every": max(1, rounds // _CHECKPOINTS)},
    }


def watch(config: dict[str, Any], folder: Path) -> list[tuple[int, float]]:
    """Run a configuration on one rank; (round, resident MiB) as soon as each round is in metrics.jsonl.

    Raises:
        RuntimeError: the run failed; with the end of its output.
    """
    samples: list[tuple[int, float]] = []
    metrics = metrics_file(config)

    def look(pid: int) -> None:
        count = finished_rounds(metrics)
        if count > (samples[-1][0] if samples else 0):
            # The run may end between the look at its log and the look at its memory.
            with contextlib.suppress(psutil.NoSuchProcess):
                samples.append((count, psutil.Process(pid).memory_info().rss / 2**20))

    run_job(config, folder, 1, _LIMIT_S, look, _LOOK_S)
    assert samples and samples[-1][0] == config["federation"]["rounds"], "the last round was not seen"
    return samples


def finished_rounds(metrics: Path) -> int:
    """Rounds of which the log tells."""
    if not metrics.exists():
        return 0
    return metrics.read_bytes().count(b'{"event":"round",')
