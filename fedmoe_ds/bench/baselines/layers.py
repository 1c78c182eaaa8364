"""Layers: the expert layers alone, forward and backward for all clients: ours in one pass, DeepSpeed's MoE client by client."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from fedmoe_ds.bench.harness.command import Note
from fedmoe_ds.bench.harness.process import scratch_folder
from fedmoe_ds.bench.harness.program import Program, alternate, workers
from fedmoe_ds.bench.harness.repeats import make_row, paired
from fedmoe_ds.bench.harness.shapes import write_model
from fedmoe_ds.bench.harness.system import OURS, DisagreementError
from fedmoe_ds.bench.harness.table import Row
from fedmoe_ds.bench.harness.workload import Workload

PART = "layers"
DEEPSPEED = "deepspeed.moe.layer.MoE"
NAMES = {OURS: f"{OURS} layers", DEEPSPEED: DEEPSPEED}
"""How rows call the systems: the names of whole systems stand for whole rounds."""
AGREEMENT = 1e-4
"""Of the largest number of an output or gradient."""


def run_layers(workloads: list[Workload], rounds: int, note: Note) -> list[Row]:
    """Measure all workloads. Raises DisagreementError where the layers do not compute the same."""
    rows = []
    for workload in workloads:
        with scratch_folder() as folder:
            write_normalised(workload, folder)
            rows += _measure(folder, workload, rounds, note)
    return rows


def write_normalised(workload: Workload, folder: Path) -> None:
    """The workload's model with routing weights that sum to one, which is DeepSpeed's rule for k > 1."""
    write_model(workload.shape, workload.seed, folder)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "norm_topk_prob": True}))


def _measure(folder: Path, workload: Workload, rounds: int, note: Note) -> list[Row]:
    with workers("fedmoe_ds.bench.baselines.layer_worker", NAMES) as running:
        for name, program in running.items():
            note(f"{workload.shape.name}: {NAMES[name]}: loading")
            program.ask(do="open", system=name, folder=str(folder), workload=workload.to_json())
        check_tensors(_tensors(folder, running))  # also the warm-up: what allocates and chooses kernels is not timed
        found = alternate(running, rounds, note, f"{workload.shape.name}: layers, ", do="run")
        return [_row(workload, name, found, program.ask(do="peak")) for name, program in running.items()]


def _tensors(folder: Path, running: dict[str, Program]) -> dict[str, dict[str, Tensor]]:
    found = {}
    for place, (name, program) in enumerate(running.items()):
        file = folder / f"layer-{place}.safetensors"
        program.ask(do="save", file=str(file))
        found[name] = load_file(file)
    return found


def check_tensors(tensors: dict[str, dict[str, Tensor]]) -> None:
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
    facts = {
        "part": PART,
        "padding": found[name][-1]["padding"],
        "wall_seconds": seconds[name],
        "cpu_seconds": [one["cpu"] for one in found[name]],
    }
    row = make_row(workload.shape.name, NAMES[name], peak, samples, **facts, **workload.facts())
    return {**row, "steps": 1, "tokens": rows}
