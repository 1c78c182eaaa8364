"""`launch/bench.py export`: OLMoE-1B-7B with random weights and adapters, merged into a whole model, and what that took.

The run is not trained: its checkpoint holds drawn adapters and rescalers, as any finished run's would. Exporting is a process
of its own, the one that `fedmoe export` is, whose peak memory the system keeps. Some weights are compared with our sums.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fedmoe_ds.bench.fullsize.command import LAYERS, NAME, place, tree, write_head
from fedmoe_ds.bench.fullsize.weights import full_size, weight_bytes, write_weights
from fedmoe_ds.bench.harness.checks import check_least
from fedmoe_ds.bench.harness.command import SEED, Command, Note, option
from fedmoe_ds.bench.harness.jobs import high_water
from fedmoe_ds.bench.harness.process import module_command, run_to_end
from fedmoe_ds.bench.harness.repeats import make_row
from fedmoe_ds.bench.harness.system import OURS
from fedmoe_ds.bench.harness.table import Column, Row, two_digits, whole
from fedmoe_ds.checkpoint.reader import Snapshot
from fedmoe_ds.checkpoint.writer import CheckpointWriter
from fedmoe_ds.config import Config, dump_config
from fedmoe_ds.distributed.control import Alone
from fedmoe_ds.distributed.launcher import Launch
from fedmoe_ds.distributed.runtime import Runtime
from fedmoe_ds.errors import UserError
from fedmoe_ds.foundation.fingerprint import fingerprint
from fedmoe_ds.foundation.weight_files import WeightFiles
from fedmoe_ds.foundation.weight_stream import WeightStream
from fedmoe_ds.planner import Job, resolve
from fedmoe_ds.planner.memory import format_bytes

LIMIT_MIB = 4 * 1024
_LIMIT_S = 3600.0
_GIB = 2**30
_TIER = "4"  # of FLAME's tiers 8, 4, 2 and 1: its rescaler is folded, and its configuration says 4

OPTIONS = (
    option("--layers", LAYERS, f"of the {LAYERS}; fewer to try it"),
    option("--folder", None, "where model and export go for the time of the measurement; on a disk", type=Path),
    option("--keep", False, "leave the folder with model, run and export behind"),
    SEED,
)
COLUMNS: list[Column] = [
    ("layers", lambda row: str(row["layers"])),
    ("weights", lambda row: format_bytes(row["weight_bytes"])),
    ("export s", lambda row: whole(row["seconds"])),
    ("MiB/s", lambda row: whole(row["mib_per_s"])),
    ("peak MiB", lambda row: whole(row["peak_mib"])),
    ("share of the weights", lambda row: two_digits(row["peak_mib"] * 2**20 / row["weight_bytes"])),
]


class WrongExportError(Exception):
    """A weight of the export is not the base's plus what was learnt."""


def run(args: argparse.Namespace, note: Note) -> list[Row]:
    """One row. Raises UserError before anything large is made, WrongExportError where weights are not what they should be."""
    check_least("--layers", args.layers)
    if args.layers > LAYERS:
        raise UserError(f"--layers: {args.layers}: the model has {LAYERS}; use {LAYERS} or less")
    if args.folder is not None and not args.folder.is_dir():
        raise UserError(f"--folder: {args.folder}: no such folder; make it, or name another")
    model = full_size(args.layers)
    with place(args.folder, args.keep, note, "fedmoe-export-") as folder:
        check_room(2 * weight_bytes(model), folder)
        write_head(model, folder / "model")
        config = Config.model_validate({**tree(folder, 256, args.seed), "name": NAME, "output": str(folder / "runs")})
        job = resolve(config)  # also prepares the data, which decide who is in which tier
        write_weights(model, args.seed, folder / "model", note)
        note("drawing adapters")
        run_folder = write_run(job, folder / "model", args.seed)
        note("exporting")
        seconds, peak = export(run_folder, folder / "export")
        compare(job, run_folder, folder)
    size = weight_bytes(model)
    facts = {"layers": args.layers, "weight_bytes": size, "seconds": seconds, "mib_per_s": size / 2**20 / seconds}
    return [make_row(NAME, OURS, peak / 2**20, **facts)]


def check_room(needed: float, folder: Path) -> None:
    """Raises UserError where the folder's disk has less space than model and export take."""
    there = shutil.disk_usage(folder).free
    if there < needed + _GIB:
        raise UserError(
            f"--folder: {folder.parent}: {there / _GIB:.1f} GiB of disk are free, and model and export take "
            f"{needed / _GIB + 1:.1f}; name a folder with more, or try fewer --layers"
        )


def write_run(job: Job, model: Path, seed: int) -> Path:
    """A run folder with a checkpoint of round 1, every number of it drawn."""
    folder = Path(job.config.output) / job.config.name
    draw = torch.Generator().manual_seed(seed)
    shared, own = {}, {}
    for block in job.blocks:
        for layer in block.layers:
            for expert in range(job.expert_layout.num_experts) if block.expert else (None,):
                if block.personal:
                    own[block.key(layer, expert)] = 1.0 + 0.1 * torch.randn(len(job.clients), *block.item, generator=draw)
                else:
                    shared[block.key(layer, expert)] = 0.01 * torch.randn(block.item, generator=draw)
    clients = [
        {"name": one.name, "samples": one.samples, "sequences": one.sequences, "targets": one.targets, "top_k": one.top_k,
         "tier_label": one.tier}
        for one in job.clients
    ]  # fmt: skip
    writer = CheckpointWriter(folder / "checkpoints", Runtime(Launch("bench", 0, 1, 0), torch.device("cpu"), Alone()), 1, False)
    tensors = {"adapters-00000-of-00001.safetensors": shared, "personal-00000-of-00001.safetensors": own}
    snapshot = Snapshot(1, {"foundation": fingerprint(model)}, 0)
    writer.begin(snapshot, tensors, {"config.yaml": dump_config(job.config)})
    writer.finish()
    event = {"event": "data", "time": time.time(), "clients": clients}
    (folder / "metrics.jsonl").write_text(json.dumps(event) + "\n", encoding="utf-8")
    return folder


def export(run_folder: Path, out: Path) -> tuple[float, int]:
    """Seconds and peak resident bytes of the process that exports a tier, its start and its imports included."""
    peak, began = [0], time.perf_counter()
    options = ["--format", "merged", "--tier", _TIER, "--out", str(out)]
    command = module_command("fedmoe_ds.commands", "export", str(run_folder), *options)

    def look(pid: int) -> None:
        peak[0] = max(peak[0], high_water(pid))

    run_to_end("the export", command, _LIMIT_S, look)
    return time.perf_counter() - began, peak[0]


def compare(job: Job, run_folder: Path, folder: Path) -> None:
    """Raise WrongExportError unless the weights of one expert per layer are what the formula says."""
    checkpoint = run_folder / "checkpoints" / "round-00001"
    members = [client.index for client in job.clients if client.tier == _TIER]
    with safe_open(checkpoint / "personal-00000-of-00001.safetensors", "pt") as file:
        rescaler = float(file.get_tensor("model.rescaler")[members].double().mean().float())
    old, new = (_reader(folder / name) for name in ("model", "export"))
    scale = job.config.adapters.alpha / job.config.adapters.rank
    with safe_open(checkpoint / "adapters-00000-of-00001.safetensors", "pt") as file:
        for layer in range(len(job.expert_layout.layers)):
            for leaf, pair, rows, factor in (
                ("up", "gate_up", slice(job.expert_layout.ffn, None), 1.0), ("down", "down", slice(None), rescaler)
            ):  # fmt: skip
                expert = (7 * layer + 3) % job.expert_layout.num_experts
                a_RI, b_OR = (file.get_tensor(f"layers.{layer}.experts.{expert}.{pair}.lora_{half}").double() for half in "AB")
                name = f"model.layers.{layer}.mlp.experts.{expert}.{leaf}_proj.weight"
                expected = factor * (old(name).double() + scale * (b_OR[rows] @ a_RI))
                if not torch.equal(new(name), expected.bfloat16()):
                    raise WrongExportError(name)


def _reader(folder: Path) -> Any:
    stream = WeightStream(WeightFiles(folder))
    by_name = {tensor.name: tensor for tensor in stream.tensors}

    def read(name: str) -> Tensor:
        return stream.block(by_name[name], slice(None))

    return read


def lines(rows: list[Row]) -> Iterator[str]:
    for row in rows:
        within = "within" if row["peak_mib"] <= LIMIT_MIB else "above"
        yield f"{whole(row['peak_mib'])} MiB are {within} the {LIMIT_MIB} that an export may take"


ABOUT = (
    "OLMoE-1B-7B at its full size with random weights in the hub's layout (bfloat16), and a run of FLAME with LoRA on all "
    "experts, attention and a rescaler: one tier of it becomes a whole model in Hugging Face's format. Peak memory and time "
    "are those of one process on one thread, imports included. One expert of every layer is compared with a sum in float64. "
    "One measurement."
)
HELP = "OLMoE-1B-7B merged into a whole model: peak memory and time; 4 GiB of memory, 28 GiB of disk"
COMMAND = Command("export", HELP, OPTIONS, run, COLUMNS, lines=lines, about=ABOUT)
