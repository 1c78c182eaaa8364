"""Wave: the same clients, model, data and steps through every system, in alternating rounds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fedmoe_ds.bench.harness.checks import check_least
from fedmoe_ds.bench.harness.command import Note
from fedmoe_ds.bench.harness.process import scratch_folder
from fedmoe_ds.bench.harness.program import Program, workers
from fedmoe_ds.bench.harness.repeats import make_row, paired
from fedmoe_ds.bench.harness.shapes import write_model
from fedmoe_ds.bench.harness.system import AGREEMENT, FLOOR, OURS, PEER_PREFIX, Timing, check_agreement
from fedmoe_ds.bench.harness.table import Row
from fedmoe_ds.bench.harness.workload import Workload
from fedmoe_ds.kernels import matrix

WORKER = "fedmoe_ds.bench.wave.worker"
SLOW_S = 45.0
"""A peer whose warm-up takes longer is not timed again: that much work needs no repetition."""
_SHARDS = {"cpu": "100MB", "cuda": "5GB"}

Spans = dict[str, list[Timing]]


def run_wave(workloads: list[Workload], systems: list[str], rounds: int, note: Note, model: Path | None = None) -> list[Row]:
    """Measure all workloads, on a `model` that is there already or one that is written for each.

    Raises UserError, or DisagreementError when losses differ.
    """
    check_least("--rounds", rounds)
    rows = []
    for workload in workloads:
        if model is not None:
            rows += _measure(model, workload, _for(workload, systems), rounds, note)
            continue
        with scratch_folder() as folder:
            write_model(workload.shape, workload.seed, folder, _SHARDS[workload.device], workload.dtype)
            rows += _measure(folder, workload, _for(workload, systems), rounds, note)
    return rows


def _for(workload: Workload, systems: list[str]) -> list[str]:
    """Without experts all experts implementations of a peer are one system."""
    peers = [name for name in systems if name.startswith(PEER_PREFIX)]
    return systems if workload.shape.experts else [name for name in systems if name not in peers[1:]]


def _measure(folder: Path, workload: Workload, systems: list[str], rounds: int, note: Note) -> list[Row]:
    with workers(WORKER, [*systems, FLOOR], workload.device) as running:
        spans: Spans = {name: [] for name in (*systems, FLOOR)}
        _warm_up(folder, workload, {name: running[name] for name in systems}, spans, note)
        # Systems take turns: a machine that becomes slower slows all of them, and ratios within a round stay.
        quick = [name for name in systems if not spans[name]]
        for turn in range(rounds):
            note(f"{workload.shape.name}: round {turn + 1} of {rounds}")
            _round({name: running[name] for name in quick}, running[FLOOR], workload, spans)
        return _rows(workload, spans, {name: running[name] for name in systems})


def _warm_up(folder: Path, workload: Workload, running: dict[str, Program], spans: Spans, note: Note) -> None:
    """Load every system and compare what they compute; a slow one has its measurement with that."""
    losses: dict[str, list[tuple[float, float]]] = {}
    for name, worker in running.items():
        note(f"{workload.shape.name}: {name}: loading and warm-up")
        worker.ask(do="open", system=name, folder=str(folder), workload=workload.to_json())
        outcome = worker.ask(do="train", stage="warm-up")
        losses[name], span = outcome["losses"], Timing(**outcome["time"])
        if span.wall > SLOW_S and not name.startswith(OURS):
            spans[name].append(span.times(workload.steps / workload.stage_steps("warm-up")))
    check_agreement(losses, AGREEMENT[workload.dtype])


def _round(running: dict[str, Program], floor: Program, workload: Workload, spans: Spans) -> None:
    """One timed wave of every system, and the floor of the same routing."""
    rows_CLE: list[list[list[int]]] = []
    for name, worker in running.items():
        outcome = worker.ask(do="train", stage="timed")
        spans[name].append(Timing(**outcome["time"]))
        rows_CLE = outcome["rows"] or rows_CLE
    # The floor multiplies what our wave has routed, so it comes last, and is opened when that is known.
    if not spans[FLOOR]:
        floor.ask(do="open", workload=workload.to_json(), rows=rows_CLE)
        floor.ask(do="measure")  # its first products touch fresh memory
    spans[FLOOR].append(Timing(**floor.ask(do="measure")))


def open_at_once(folder: Path, opened: Mapping[str, tuple[Program, Workload]], system: str | None = None) -> None:
    """Load systems by name in their processes at the same time; `system` where the names are not those of systems."""
    for name, (program, workload) in opened.items():
        program.send(do="open", system=system or name, folder=str(folder), workload=workload.to_json())
    for program, _ in opened.values():
        program.receive()


def _rows(workload: Workload, spans: Spans, running: dict[str, Program]) -> list[Row]:
    wall = {name: [span.wall for span in found] for name, found in spans.items()}
    cpu = {name: [span.cpu for span in found] for name, found in spans.items()}
    ours, floor = next(iter(running)), cpu if workload.device == "cpu" else wall
    rows = []
    for name, program in running.items():
        samples = {
            "tokens_per_s": [workload.tokens / seconds for seconds in wall[name]],
            "floor_share": paired(floor[FLOOR], floor[name]),
            "ratio": paired(wall[name], wall[ours]),
            "cpu_ratio": paired(cpu[name], cpu[ours]),
        }
        seconds = {"wall_seconds": wall[name], "cpu_seconds": cpu[name], "floor_cpu_seconds": cpu[FLOOR]}
        kinds = {"dtype": workload.dtype, "device": workload.device, "kernels": workload.kernels}
        compiled = matrix.kernel() if workload.device == "cpu" else None
        kinds |= {"processor": compiled.processor} if compiled is not None else {}
        peak = program.ask(do="peak")
        rows.append(make_row(workload.shape.name, name, peak, samples, **seconds, **workload.facts(), **kinds))
    return rows
