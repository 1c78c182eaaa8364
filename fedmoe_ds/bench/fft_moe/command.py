"""`launch/bench.py experts`: a wave of FFT-MoE client steps with few and with many adapter experts per layer.

The number of active experts stays, so the arithmetic of the passes does too; what grows is what every client in flight owns:
values, gradients and two moments of all experts, used or not.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from fedmoe_ds.bench.fft_moe.workload import DENSE, FFN, HIDDEN, LAYERS, POOL_PREFIX, PoolWorkload, write_dense_model
from fedmoe_ds.bench.harness.checks import check_least
from fedmoe_ds.bench.harness.command import SEED, Command, Note, option, values_of
from fedmoe_ds.bench.harness.process import scratch_folder
from fedmoe_ds.bench.harness.program import Program, alternate, workers
from fedmoe_ds.bench.harness.repeats import make_row, paired, shown
from fedmoe_ds.bench.harness.system import check_agreement
from fedmoe_ds.bench.harness.table import Column, Row, percent, two_digits, whole
from fedmoe_ds.errors import UserError

Found = dict[str, list[dict[str, Any]]]

COLUMNS: list[Column] = [
    ("system", lambda row: row["system"]),
    ("ms / step", lambda row: shown(row, "step_seconds", lambda seconds: f"{1000 * seconds:.0f}")),
    ("/ fewest", lambda row: shown(row, "to_first", two_digits)),
    ("/ dense", lambda row: shown(row, "to_dense", two_digits)),
    ("passes", lambda row: shown(row, "passes_share", percent)),
    ("optimizer", lambda row: shown(row, "optimizer_share", percent)),
    ("set-up", lambda row: shown(row, "setup_share", percent)),
    ("adapters MiB", lambda row: whole(row["adapter_mib"])),
    ("optimizer MiB", lambda row: whole(row["optimizer_mib"])),
    ("peak MiB", lambda row: whole(row["peak_mib"])),
]

ABOUT = (
    "A local step of FFT-MoE with pools of adapter experts of several sizes, eight clients in flight. The floor is "
    "the forward and backward pass of the dense foundation alone. Peaks are measured once."
)
OPTIONS = (
    option("--experts", [8, 64, 256], "pool sizes per layer"),
    option("--steps", 4, "local steps per client in a timed wave"),
    option("--rounds", 3, "alternating repeats; medians are reported"),
    option("--clients", 8, "clients in flight"),
    option("--sequences", 4, "sequences per client and step"),
    option("--length", 128, "tokens per sequence"),
    option("--bitwise", False, "one client per pass, as reproducible=bitwise runs them"),
    SEED,
)


def run(args: argparse.Namespace, note: Note) -> list[Row]:
    workload = PoolWorkload(**values_of(args, "steps", "clients", "sequences", "length", "seed", "bitwise"))
    return run_pool(args.experts, workload, args.rounds, note)


def run_pool(sizes: list[int], workload: PoolWorkload, rounds: int, note: Note) -> list[Row]:
    """Measure the foundation alone, then every pool size, in alternating rounds after one warm-up.

    Raises:
        UserError: no round, or a pool with fewer experts than are active.
        DisagreementError: the first losses differ, although no expert has learnt anything yet.
    """
    check_least("--rounds", rounds)
    for size in sizes:
        if size < workload.top_k:
            raise UserError(f"--experts: {size}: fewer than the {workload.top_k} active ones; use {workload.top_k} or more")
    names = [DENSE, *(f"{POOL_PREFIX}{size}" for size in dict.fromkeys(sizes))]
    with scratch_folder() as folder, workers("fedmoe_ds.bench.fft_moe.systems", names) as running:
        write_dense_model(workload.seed, folder)
        for name, program in running.items():
            note(f"{name}: loading and warm-up")
            program.ask(do="open", folder=str(folder), workload=workload.to_json())
        # The compared wave is the warm-up as well: it is not timed.
        check_first_losses({name: program.ask(do="measure")["losses"] for name, program in running.items()})
        return _rows(workload, alternate(running, rounds, note, do="measure"), running)


def check_first_losses(losses: dict[str, list[float]]) -> None:
    """Adapter experts start at zero, so every pool starts with the foundation's own losses. Raises DisagreementError."""
    check_agreement({name: [(loss,) for loss in found] for name, found in losses.items()})


def _rows(workload: PoolWorkload, found: Found, running: dict[str, Program]) -> list[Row]:
    first = next(name for name in found if name != DENSE)
    step = {name: [one["wall"] / workload.steps for one in many] for name, many in found.items()}
    facts = {**workload.to_json(), "hidden": HIDDEN, "ffn": FFN, "layers": LAYERS}
    rows = []
    for name, many in found.items():
        dense = name == DENSE
        samples = {
            "tokens_per_s": [workload.tokens / spent for spent in step[name]],
            "step_seconds": step[name],
            "to_first": paired(step[name], step[first]),
            "to_dense": paired(step[name], step[DENSE]),
            **({} if dense else _shares(many)),
        }
        more: Row = {
            "experts": None if dense else int(name.removeprefix(POOL_PREFIX)),
            **(dict.fromkeys((*SHARES, *SIZES)) if dense else _sizes(many[0])),
            "wall_seconds": [one["wall"] for one in many],
            "cpu_seconds": [one["cpu"] for one in many],
        }
        rows.append(make_row("pool", name, running[name].ask(do="peak"), samples, **more, **facts))
    return rows


SHARES = ("passes_share", "optimizer_share", "setup_share")
SIZES = ("adapter_mib", "optimizer_mib", "used_experts")


def _shares(many: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Of every wave: passes, optimizer with clipping, and what is left (clearing and copying at its begin, reports)."""
    passes, optimizer = ([one["parts"][part] / one["wall"] for one in many] for part in ("passes", "optimizer"))
    rest = [1.0 - a - b for a, b in zip(passes, optimizer, strict=True)]
    return dict(zip(SHARES, (passes, optimizer, rest), strict=True))


def _sizes(one: dict[str, Any]) -> dict[str, float]:
    """What does not change from wave to wave."""
    values = (one["adapter_bytes"] / 2**20, one["optimizer_bytes"] / 2**20, statistics.mean(one["used"]))
    return dict(zip(SIZES, values, strict=True))


HELP = "a client step with few and with many adapter experts (FFT-MoE)"
COMMAND = Command("experts", HELP, OPTIONS, run, COLUMNS, about=ABOUT)
