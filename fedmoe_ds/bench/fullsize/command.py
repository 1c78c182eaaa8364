"""`launch/bench.py fullsize`: OLMoE-1B-7B trained by two ranks of this machine, beside the planner's prediction.

The weights are random, in the hub's layout (`weights.py`), and read as a downloaded model's are. All that is written lies in
one folder, which is removed at the end, also after Ctrl-C. Memory and disk are compared with the plan before the first shard.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from fedmoe_ds.bench.calibration.command import calibrate
from fedmoe_ds.bench.fullsize.weights import full_size, weight_bytes, write_weights
from fedmoe_ds.bench.harness.checks import check_least
from fedmoe_ds.bench.harness.command import SEED, Command, Note, option
from fedmoe_ds.bench.harness.jobs import Finished, run_job
from fedmoe_ds.bench.harness.process import scratch_folder
from fedmoe_ds.bench.harness.table import Column, Row, two_digits, whole
from fedmoe_ds.bench.planned.command import Case, compare, predictions
from fedmoe_ds.config import Config
from fedmoe_ds.data import stdlib
from fedmoe_ds.data.tokenizer import train_tokenizer
from fedmoe_ds.errors import UserError
from fedmoe_ds.machine import available_mib
from fedmoe_ds.planner import load_hardware, resolve
from fedmoe_ds.planner.memory import format_bytes

NAME = "olmoe-1b-7b"
LAYERS, RANKS, CLIENTS, IN_FLIGHT, ROUNDS = 16, 2, 4, 2, 2
_POSITIONS, _TOKENS = 4096, 2048
_LIMIT_S = 7200.0
_GIB = 2**30
# What a plan may be off by, for memory (tests/cluster/test_planner_measured.py); what the run writes beside the weights: maps,
# prepared data, checkpoints.
_MARGIN, _BESIDE = 1.10, 2.0

OPTIONS = (
    option("--layers", LAYERS, f"of the {LAYERS}; fewer to try it"),
    option("--length", 256, f"tokens per sequence; each of {CLIENTS} clients trains one in a round"),
    option("--mapped", "shared", "weights in mapped files, as foundation.mapped", choices=("shared", "all")),
    option("--hardware", None, "a file of `calibrate`; default: calibrate first", type=Path),
    option("--folder", None, "where the weights go for the time of the run; on a disk, not in memory", type=Path),
    option("--keep", False, "leave the folder with weights and run behind"),
    SEED,
)
COLUMNS: list[Column] = [
    ("layers", lambda row: str(row["layers"])),
    ("weights", lambda row: format_bytes(row["weight_bytes"])),
    ("clusters x ep", lambda row: f"{row['clusters']} x {row['ep_size']}"),
    ("tokens", lambda row: str(row["tokens"])),
    ("round s", lambda row: two_digits(row["round_s"])),
    ("predicted", lambda row: two_digits(row["predicted_round_s"])),
    ("ratio", lambda row: two_digits(row["round_ratio"])),
    ("peak MiB", lambda row: " / ".join(whole(peak) for peak in row["peaks_mib"])),
    ("predicted", lambda row: whole(row["predicted_mib"])),
    ("ratio", lambda row: two_digits(row["memory_ratio"])),
    ("mapped", lambda row: row["mapped"]),
    ("restart s", lambda row: two_digits(row["restart_s"])),
    ("read", lambda row: "" if row["restart_read_bytes"] is None else format_bytes(row["restart_read_bytes"])),
]


def run(args: argparse.Namespace, note: Note) -> list[Row]:
    """One row: round time and memory of the second round beside the plan's, and a second start.

    Raises UserError before anything large is made.
    """
    check_least("--layers", args.layers)
    check_least("--length", args.length, 8)
    for name, value, most in (("--layers", args.layers, LAYERS), ("--length", args.length, _POSITIONS)):
        if value > most:
            raise UserError(f"{name}: {value}: the model has {most}; use {most} or less")
    hardware = load_hardware("cpu" if args.hardware is None else args.hardware)
    if args.folder is not None and not args.folder.is_dir():
        raise UserError(f"--folder: {args.folder}: no such folder; make it, or name another")
    with place(args.folder, args.keep, note, "fedmoe-fullsize-") as folder:
        model = full_size(args.layers)
        write_head(model, folder / "model")
        case = Case(NAME, tree(folder, args.length, args.seed, args.mapped), {RANKS: RANKS})
        config = case.config(str(folder / "runs"), RANKS, ROUNDS)
        job = resolve(Config.model_validate(config))  # also prepares the data
        assumed = predictions(job, RANKS, 1, hardware)[0].memory_total * RANKS
        check_room(assumed, weight_bytes(model) * (1 if args.mapped == "shared" else 1.5), folder)
        if args.hardware is None:
            hardware = calibrate(note)
        predicted = predictions(job, RANKS, ROUNDS, hardware)
        write_weights(model, args.seed, folder / "model", note)
        planned = sum(one.round_seconds for one in predicted)
        note(f"{ROUNDS} rounds on {RANKS} ranks; the plan says {planned:.0f} s, after loading")
        done = run_job(config, folder, RANKS, _LIMIT_S, every_s=0.5)
        note("once more, for another round")
        again = restart(config | {"federation": config["federation"] | {"rounds": ROUNDS + 1}}, folder)
    facts = {"layers": args.layers, "length": args.length, "weight_bytes": weight_bytes(model), **_told(done), **again}
    facts["mapped"] = args.mapped
    return [compare(case, RANKS, predicted, done) | facts]


def restart(config: dict[str, Any], folder: Path) -> dict[str, float | None]:
    """A second start that goes on: seconds from the launcher's start until rounds go on, and what the disk was read for in all.

    Whatever the first run left in the page cache is there, as after a failure. The bytes are those of the whole machine.
    """
    began, before = time.time(), _disk_reads()
    events = run_job(config, folder, RANKS, _LIMIT_S, every_s=0.5, more=("--resume", "auto")).events
    resumed = next(event["time"] for event in reversed(events) if event["event"] == "resume")
    after = _disk_reads()
    read = None if before is None or after is None else after - before
    return {"restart_s": resumed - began, "restart_read_bytes": read}


def _disk_reads() -> int | None:
    """Bytes that this machine has read from its disks since it was started; None where it does not say."""
    counters = psutil.disk_io_counters()
    return None if counters is None else int(counters.read_bytes)


@contextlib.contextmanager
def place(parent: Path | None, keep: bool, note: Note, prefix: str) -> Iterator[Path]:
    """A folder in `parent` that is gone afterwards, unless it is to be kept."""
    if not keep:
        with scratch_folder(prefix, parent) as folder:
            yield folder
        return
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    note(f"kept: {folder}")
    yield folder


def write_head(config: dict[str, object], folder: Path) -> None:
    """A model folder without its weights: what the plan and the preparation of data read."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    texts = [document.text for document in stdlib.split(stdlib.documents())[0]]
    # No tokenizer of 50 304 entries: embeddings and logits have the model's width all the same.
    train_tokenizer(texts, _TOKENS).save_pretrained(folder)


def tree(folder: Path, length: int, seed: int, mapped: str = "shared") -> dict[str, Any]:
    """FLAME at its default tiers: in a round every client trains one sequence. Evaluated with one sequence, at the end.

    Two waves, and layers that are computed twice: as one would have it on a machine that is as small for the model.
    """
    cache = {"cache": str(folder / "cache"), "mapped": mapped}
    return {
        "seed": seed,
        "foundation": {"path": str(folder / "model"), "dtype": "bfloat16", **cache},
        "local": {"steps": 1, "batch_size": 1, "lr": 1e-4},
        "data": {"sequence_length": length, "max_samples": 4, "partition": {"kind": "natural", "clients": CLIENTS}},
        "execution": {"clients_in_flight": IN_FLIGHT, "activation_checkpointing": True},
        "evaluation": {"every": ROUNDS, "max_sequences": 1, "client_sequences": 0},
    }


def check_room(memory: float, weights: float, folder: Path) -> None:
    """Raises UserError where the machine has less free memory, or the folder's disk less space, than the run will take."""
    needed, there = memory * _MARGIN, available_mib() * 2**20
    if there < needed:
        raise UserError(
            f"memory: {there / _GIB:.1f} GiB are free, and {RANKS} ranks take {memory / _GIB:.1f} by plan and "
            f"{needed / _GIB:.1f} with a margin; free some, or try fewer --layers"
        )
    needed, there = _BESIDE * weights + 2 * _GIB, shutil.disk_usage(folder).free
    if there < needed:
        raise UserError(
            f"--folder: {folder.parent}: {there / _GIB:.1f} GiB of disk are free, and weights and run take up to "
            f"{needed / _GIB:.1f}; name a folder with more, or try fewer --layers"
        )


def _told(done: Finished) -> dict[str, Any]:
    """What a row has beside the comparison: tokens of the round, and what there was before it."""
    end = next(event for event in done.events if event["event"] == "end")
    last = done.rounds()[-1]
    return {"tokens": last["tokens"], "run_s": end["seconds"], "rounds_s": sum(event["seconds"] for event in done.rounds())}


def lines(rows: list[Row]) -> Iterator[str]:
    """The largest parts of memory by plan, and of the round's time in both."""
    for row in rows:
        parts = sorted(row["predicted_memory"].items(), key=lambda part: -part[1])[:6]
        yield "memory by plan, MiB: " + ", ".join(f"{name} {size / 2**20:.0f}" for name, size in parts)
        phases = ", ".join(f"{name} {row['phases'][name]:.1f} ({row['predicted_phases'][name]:.1f})" for name in row["phases"])
        yield f"phases of the round, s, with the plan's: {phases}; the whole run took {row['run_s']:.0f} s"


ABOUT = (
    "OLMoE-1B-7B at its full size, random weights in the hub's layout: two ranks of one machine share the experts (ep_size 2), "
    "bfloat16, four clients of FLAME's four tiers with one sequence each, two at a time, layers computed twice. Round time and "
    "the peak memory of each rank stand beside what the planner predicted after a calibration; the first round warms up and is "
    "not compared. Then a second start goes on with another round: seconds from the launcher until the run is resumed, and "
    "what the machine read from its disk until the end. One measurement."
)
HELP = "OLMoE-1B-7B at full size on two ranks, beside its plan: 24 GiB of memory, 30 GiB of disk (41 with all weights mapped)"
COMMAND = Command("fullsize", HELP, OPTIONS, run, COLUMNS, lines=lines, about=ABOUT)
