"""Federated: rounds per hour of the same federation on all cores: ours, and Flower's simulation engine over PEFT clients.

Everybody takes part in every round and is trained from the global adapters; the server takes their mean. Ours has one rank per
core, a cluster each; Flower has one actor per core. Two rounds that are not timed come first: actors load the model in the
first one, and what the systems compute is compared in both. A round ends with the new global adapters; nothing is evaluated.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fedmoe_ds.bench.harness.command import Note
from fedmoe_ds.bench.harness.process import module_command, scratch_folder
from fedmoe_ds.bench.harness.program import Program, Start, alternate, programs
from fedmoe_ds.bench.harness.repeats import make_row, paired
from fedmoe_ds.bench.harness.shapes import write_model
from fedmoe_ds.bench.harness.system import BITWISE, DisagreementError, check_agreement
from fedmoe_ds.bench.harness.table import Row
from fedmoe_ds.bench.harness.workload import Workload
from fedmoe_ds.distributed.launcher import free_port
from fedmoe_ds.errors import UserError

PART = "rounds"
FLOWER = "flower simulation"
WARM_UP_ROUNDS = 2
ADAPTER_AGREEMENT = 1e-2
"""Of the distance that the global adapters moved: AdamW makes full steps of the rounding noise in tiny gradients."""

ROOT = Path(__file__).resolve().parents[3]
PYTHON = ROOT / ".venv-peers" / "bin" / "python"
_QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}


def check_environment() -> None:
    """Raises UserError where Flower's environment is missing."""
    if not PYTHON.exists():
        raise UserError(
            f"--systems: flower: it needs an environment of its own and {PYTHON} is missing; run `make bench-peers`, or leave "
            "flower out with --systems deepspeed"
        )


def run_federations(workloads: list[Workload], ours: list[str], rounds: int, note: Note) -> list[Row]:
    """Measure all workloads. Raises UserError, or DisagreementError where the systems do not compute the same."""
    check_environment()
    rows = []
    for workload in workloads:
        with scratch_folder("fm-") as folder:  # short: Ray has sockets below
            write_model(workload.shape, workload.seed, folder / "model")
            rows += _measure(folder, workload, ours, rounds, note)
    return rows


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def our_starts(ranks: int) -> list[Start]:
    """One rank per core."""
    world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = module_command("fedmoe_ds.bench.baselines.federated_rank")
    return [Start(command, {**world, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(ranks)]


def flower_starts(home: Path) -> list[Start]:
    """The engine's main process; it starts Ray. What Flower remembers of its user stays in `home`."""
    variables = {**_QUIET, "FLWR_HOME": str(home), "PYTHONPATH": str(ROOT)}
    return [Start([str(PYTHON), "-m", "fedmoe_ds.bench.baselines.flower"], variables)]


def _measure(folder: Path, workload: Workload, ours: list[str], rounds: int, note: Note) -> list[Row]:
    # All systems stay loaded and take turns: what disturbs the machine disturbs everybody's round.
    starts = {name: our_starts(cores()) for name in ours} | {FLOWER: flower_starts(folder / "flower")}
    with programs(starts) as running:
        versions = open_all(folder, workload, running, WARM_UP_ROUNDS + rounds, note)
        gaps = _warm_up(folder, workload, running, note)
        found = alternate(running, rounds, note, f"{workload.shape.name}: ", do="round", stage="timed")
    rows = [_row(workload, name, found) for name in starts]
    for row in rows:
        row["adapters_apart"] = gaps.get(row["system"])
    rows[-1]["versions"] |= versions
    return rows


def open_all(folder: Path, workload: Workload, running: dict[str, Program], rounds: int, note: Note) -> dict[str, str]:
    """Load every system for so many rounds; returns the versions in Flower's environment."""
    request = {"do": "open", "folder": str(folder / "model"), "workload": workload.to_json()}
    scratch = folder / "ray"
    for name, program in running.items():
        note(f"{workload.shape.name}: {name}: loading")
        if name != FLOWER:
            program.ask(**request, bitwise=name == BITWISE)
    opened = running[FLOWER].ask(**request, cores=cores(), rounds=rounds, scratch=str(scratch))
    versions: dict[str, str] = opened["versions"]
    return versions


def _warm_up(folder: Path, workload: Workload, running: dict[str, Program], note: Note) -> dict[str, float]:
    """The first round compares what clients compute, the second one what the server made of it.

    The first losses of the second round depend on every averaged adapter. Returns what `check_adapters` found.
    """
    gaps: dict[str, float] = {}
    for turn in range(WARM_UP_ROUNDS):
        note(f"{workload.shape.name}: warm-up round {turn + 1} of {WARM_UP_ROUNDS}")
        losses = {name: program.ask(do="round", stage="warm-up")["losses"] for name, program in running.items()}
        check_agreement(losses if turn == 0 else {name: [one[:1] for one in found] for name, found in losses.items()})
        if turn == 0:
            gaps = check_adapters(folder, running)
    return gaps


def check_adapters(folder: Path, running: dict[str, Program]) -> dict[str, float]:
    """The global adapters after one round are those of Flower. Raises DisagreementError.

    Returns the distance from Flower's over the distance that they moved, by system.
    """
    gaps = {}
    for place, (name, program) in enumerate(running.items()):
        if name == FLOWER:
            continue
        file = folder / f"adapters-{place}.safetensors"
        program.ask(do="save", file=str(file))
        found = running[FLOWER].ask(do="compare", file=str(file))
        gaps[name] = share = found["distance"] / found["moved"]
        if not share <= ADAPTER_AGREEMENT:  # nan fails as well
            raise DisagreementError(
                f"after one round the global adapters of {name} and of {FLOWER} are {100 * share:.2g} % of the way apart that "
                "they moved: not the same computation"
            )
    return gaps


def _row(workload: Workload, name: str, found: dict[str, list[dict[str, Any]]]) -> Row:
    seconds = {system: [one["seconds"] for one in answers] for system, answers in found.items()}
    mine = found[name]
    samples = {
        "tokens_per_s": [workload.tokens / spent for spent in seconds[name]],
        "rounds_per_hour": [3600.0 / spent for spent in seconds[name]],
        "ratio": paired(seconds[name], seconds[next(iter(found))]),
        "training_share": [one["training_seconds"] / one["seconds"] / cores() for one in mine],
    }
    facts = {"part": PART, "round_seconds": seconds[name], "processes": cores()}
    peak = max(one["peak_mib"] for one in mine)
    return make_row(workload.shape.name, name, peak, samples, **facts, **workload.facts())
