"""Layers: the expert layers alone, forward and backward for all clients: ours in one pass, DeepSpeed's MoE client by client."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from fedmoe_ds.bench.baselines.federated import workload_facts
from fedmoe_ds.bench.harness.program import Program, Start, module_command, programs
from fedmoe_ds.bench.harness.repeats import paired
from fedmoe_ds.bench.harness.shapes import write_model
from fedmoe_ds.bench.harness.system import OURS
from fedmoe_ds.bench.harness.table import Row
from fedmoe_ds.bench.harness.workload import Workload
from fedmoe_ds.bench.wave.measure import DisagreementError
from fedmoe_ds.machine import machine_facts

PART = "layers"
DEEPSPEED = "deepspeed.moe.layer.MoE"
NAMES = {OURS: f"{OURS} layers", DEEPSPEED: DEEPSPEED}
"""How rows call the systems: the names of whole systems stand for whole rounds."""
AGREEMENT = 1e-4
"""Of the largest number of an output or gradient."""

Note = Callable[[str], None]


def run_layers(workloads: list[Workload], rounds: int, note: Note) -> list[Row]:
    """Measure all workloads. Raises DisagreementError where the layers do not compute the same."""
    rows = []
    for workload in workloads:
        with tempfile.TemporaryDirectory(prefix="fedmoe-bench-") as folder:
            write_normalised(workload, Path(folder))
            rows += _measure(Path(folder), workload, rounds, note)
    return rows


def write_normalised(workload: Workload, folder: Path) -> None:
    """The workload's model with routing weights that sum to one, which is DeepSpeed's rule for k > 1."""
    write_model(workload.shape, workload.seed, folder)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "norm_topk_prob": True}))


def _measure(folder: Path, workload: Workload, rounds: int, note: Note) -> list[Row]:
    command = module_command("fedmoe_ds.bench.baselines.layer_worker")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in NAMES}
    with programs({name: [Start(command)] for name in NAMES}) as running:
        for name, program in running.items():
            note(f"{workload.shape.name}: {NAMES[name]}: loading")
            program.ask(do="open", system=name, folder=str(folder), workload=workload.to_json())
        check_agreement(_tensors(folder, running))
        for turn in range(rounds):
            note(f"{workload.shape.name}: layers, round {turn + 1} of {rounds}")
            for name, program in running.items():
                found[name].append(program.ask(do="run"))
        peaks = {name: program.ask(do="peak") for name, program in running.items()}
    return [_row(workload, name, found, peaks[name]) for name in NAMES]


def _tensors(folder: Path, running: dict[str, Program]) -> dict[str, dict[str, Tensor]]:
    found = {}
    for place, (name, program) in enumerate(running.items()):
        file = folder / f"layer-{place}.safetensors"
        program.ask(do="save", file=str(file))
        found[name] = load_file(file)
    return found


def check_agreement(tensors: dict[str, dict[str, Tensor]]) -> None:
    """Outputs of the first layer, and the gradients of the first client's adapters there, agree. Raises DisagreementError."""
    reference, ours = next(iter(tensors.items()))
    for name, theirs in tensors.items():
        expected = {**ours, "y": ours["y"] * theirs["factors"].unsqueeze(-1)}
        for key in sorted(expected.keys() - {"factors"}):
            gap = float((theirs[key] - expected[key]).abs().max() / expected[key].abs().max())
            if not gap <= AGREEMENT:  # nan fails as well
                raise DisagreementError(
                    f"{key}: {NAMES[name]} and {NAMES[reference]} differ by {gap:.1e} of the largest number: not the same "
                    "computation"
                )


def _row(workload: Workload, name: str, found: dict[str, list[dict[str, float]]], peak: float) -> Row:
    seconds = {system: [one["wall"] for one in answers] for system, answers in found.items()}
    rows = len(workload.caps) * workload.sequences * workload.length
    samples = {
        "tokens_per_s": [rows / spent for spent in seconds[name]],
        "ratio": paired(seconds[name], seconds[next(iter(found))]),
    }
    row: dict[str, Any] = {
        "shape": workload.shape.name,
        "system": NAMES[name],
        "part": PART,
        "peak_mib": peak,
        "floor_share": None,
        **{figure: statistics.median(values) for figure, values in samples.items()},
        "samples": samples,
        "padding": found[name][-1]["padding"],
        "wall_seconds": seconds[name],
        "cpu_seconds": [one["cpu"] for one in found[name]],
        **workload_facts(workload),
        **machine_facts(),
    }
    return {**row, "steps": 1, "tokens": rows}
