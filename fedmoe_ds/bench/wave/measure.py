"""Wave: the same clients, model, data and steps through every system, in alternating rounds."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedmoe_ds.bench.harness.process import Worker, workers
from fedmoe_ds.bench.harness.repeats import paired
from fedmoe_ds.bench.harness.shapes import find_shape, write_model
from fedmoe_ds.bench.harness.system import BITWISE, FLOOR, OURS, PEER_PREFIX, Timing
from fedmoe_ds.bench.harness.table import Row
from fedmoe_ds.bench.harness.workload import AGREEMENT, Workload
from fedmoe_ds.bench.wave.peft import IMPLEMENTATIONS
from fedmoe_ds.errors import UserError, nearest
from fedmoe_ds.machine import machine_facts

SLOW_S = 45.0
"""A peer whose warm-up takes longer is not timed again: that much work needs no repetition."""
_SHARDS = {"cpu": "100MB", "cuda": "5GB"}
MODES = {"fast": [OURS], "bitwise": [BITWISE], "both": [OURS, BITWISE]}

Note = Callable[[str], None]
Spans = dict[str, list[Timing]]


class DisagreementError(Exception):
    """Two systems do not compute the same thing, so their speeds must not be compared."""


def system_names(mode: str, peers: list[str]) -> list[str]:
    """The systems of a run, ours first. Raises UserError for an unknown mode or peer."""
    if mode not in MODES:
        raise UserError(f"--mode: {mode}: unknown mode{nearest(mode, MODES)}")
    for peer in peers:
        if peer not in IMPLEMENTATIONS:
            raise UserError(f"--peers: {peer}: unknown experts implementation{nearest(peer, IMPLEMENTATIONS)}")
    return [*MODES[mode], *(PEER_PREFIX + peer for peer in dict.fromkeys(peers))]


def run_wave(workloads: list[Workload], systems: list[str], rounds: int, note: Note) -> list[Row]:
    """Measure all workloads. Raises UserError, or DisagreementError when losses differ."""
    if rounds < 1:
        raise UserError(f"--rounds: {rounds}: too small; use 1 or more")
    rows = []
    for workload in workloads:
        with tempfile.TemporaryDirectory(prefix="fedmoe-bench-") as folder:
            write_model(workload.shape, workload.seed, Path(folder), _SHARDS[workload.device], workload.dtype)
            rows += _measure(Path(folder), workload, systems, rounds, note)
    return rows


def make_workloads(shapes: list[str], sequences: list[int], **settings: Any) -> list[Workload]:
    """One workload per shape name and number of sequences in a step."""
    counts = dict.fromkeys(sequences)
    return [Workload(find_shape(name), sequences=n, **settings) for name in dict.fromkeys(shapes) for n in counts]


def _measure(folder: Path, workload: Workload, systems: list[str], rounds: int, note: Note) -> list[Row]:
    with workers([*systems, FLOOR], workload.device) as running:
        spans: Spans = {name: [] for name in (*systems, FLOOR)}
        _warm_up(folder, workload, {name: running[name] for name in systems}, spans, note)
        quick = [name for name in systems if not spans[name]]
        for turn in range(rounds):
            note(f"{workload.shape.name}: round {turn + 1} of {rounds}")
            _round({name: running[name] for name in quick}, running[FLOOR], workload, spans)
        return _rows(workload, spans, {name: running[name] for name in systems})


def _warm_up(folder: Path, workload: Workload, running: dict[str, Worker], spans: Spans, note: Note) -> None:
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


def _round(running: dict[str, Worker], floor: Worker, workload: Workload, spans: Spans) -> None:
    """One timed wave of every system, and the floor of the same routing."""
    rows_CLE: list[list[list[int]]] = []
    for name, worker in running.items():
        outcome = worker.ask(do="train", stage="timed")
        spans[name].append(Timing(**outcome["time"]))
        rows_CLE = outcome["rows"] or rows_CLE
    if not spans[FLOOR]:
        floor.ask(do="open", workload=workload.to_json(), rows=rows_CLE)
        floor.ask(do="measure")
    spans[FLOOR].append(Timing(**floor.ask(do="measure")))


def check_agreement(losses: dict[str, list[tuple[float, float]]], tolerance: float = AGREEMENT["float32"]) -> None:
    """Every system's losses per client, at the first and at the last warm-up step, equal those of the first system.

    The first loss compares the forward pass, the last one gradients and optimizer as well. Differences are relative above 1:
    AdamW's first step turns rounding noise in tiny gradients into steps of full size.
    """
    reference = next(iter(losses))
    for name, found in losses.items():
        assert len(found) == len(losses[reference])
        for client, (ours, theirs) in enumerate(zip(losses[reference], found, strict=True)):
            gaps = [abs(a - b) / max(1.0, abs(a)) for a, b in zip(ours, theirs, strict=True)]
            if not all(gap <= tolerance for gap in gaps):  # nan fails as well
                raise DisagreementError(
                    f"client {client}: {reference} has the losses {ours}, {name} has {theirs} (first and last warm-up step); "
                    f"they differ by more than {tolerance:.0e}: not the same computation"
                )


def _rows(workload: Workload, spans: Spans, running: dict[str, Worker]) -> list[Row]:
    wall = {name: [span.wall for span in found] for name, found in spans.items()}
    cpu = {name: [span.cpu for span in found] for name, found in spans.items()}
    ours, floor = next(iter(running)), cpu if workload.device == "cpu" else wall
    facts = {**workload.shape.facts(), **machine_facts()}
    wave = {
        "clients": len(workload.caps),
        "caps": list(workload.caps),
        "sequences": workload.sequences,
        "length": workload.length,
        "steps": workload.steps,
        "seed": workload.seed,
        "dtype": workload.dtype,
        "device": workload.device,
        "kernels": workload.kernels,
        "tokens": workload.tokens,
    }
    rows = []
    for name, worker in running.items():
        samples = {
            "tokens_per_s": [workload.tokens / seconds for seconds in wall[name]],
            "floor_share": paired(floor[FLOOR], floor[name]),
            "ratio": paired(wall[name], wall[ours]),
            "cpu_ratio": paired(cpu[name], cpu[ours]),
        }
        row = {
            "shape": workload.shape.name,
            "system": name,
            "peak_mib": worker.ask(do="peak"),
            **{figure: statistics.median(found) for figure, found in samples.items()},
            "samples": samples,
            "wall_seconds": wall[name],
            "cpu_seconds": cpu[name],
            "floor_cpu_seconds": cpu[FLOOR],
        }
        rows.append({**row, **wave, **facts})
    return rows
