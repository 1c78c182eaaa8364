"""`launch/bench.py load`: peak host memory per rank while a model is loaded, at several expert-parallel sizes."""

from __future__ import annotations

import argparse

from fedmoe_ds.bench.harness.command import SEED, Command, Note, option
from fedmoe_ds.bench.harness.process import scratch_folder
from fedmoe_ds.bench.harness.ranks import run_on_ranks
from fedmoe_ds.bench.harness.repeats import make_row
from fedmoe_ds.bench.harness.shapes import Shape, find_shape, write_model
from fedmoe_ds.bench.harness.system import OURS
from fedmoe_ds.bench.harness.table import Column, Row, whole
from fedmoe_ds.errors import UserError

COLUMNS: list[Column] = [
    ("ep_size", lambda row: str(row["ep_size"])),
    ("rank", lambda row: str(row["rank"])),
    ("peak MiB", lambda row: whole(row["peak_mib"])),
    ("growth", lambda row: whole(row["growth_mib"])),
    ("dense", lambda row: whole(row["dense_mib"])),
    ("own experts", lambda row: whole(row["own_experts_mib"])),
    ("whole model", lambda row: whole(row["model_mib"])),
]

ABOUT = (
    "Peak memory of every rank while the experts of a model are spread over ranks, each in a process of its own. The "
    "floor is what a rank keeps: the dense part and its own experts. Every figure is one measurement."
)
OPTIONS = (
    option("--ep-size", [1, 2, 4], "expert-parallel sizes"),
    option("--shape", "load", "load (about 600 MiB) or load-tiny"),
    SEED,
)
# One batch of mapped file pages (64 MiB, see foundation.weight_files) and what Python needs for names and modules.
ALLOWANCE_MIB = 64 + 48


class TooMuchMemoryError(Exception):
    """A rank held more than the dense part and its own experts."""


def run(args: argparse.Namespace, note: Note) -> list[Row]:
    return run_load(args.ep_size, args.shape, args.seed, note)


def run_load(ep_sizes: list[int], shape_name: str, seed: int, note: Note) -> list[Row]:
    """One row per rank and expert-parallel size.

    Raises:
        UserError: an expert-parallel size that does not divide the experts.
        TooMuchMemoryError: a rank's memory grew by more than dense part, own experts and allowance.
    """
    shape = find_shape(shape_name)
    for ep_size in ep_sizes:
        if ep_size < 1 or shape.experts % ep_size:
            fits = [size for size in range(1, shape.experts + 1) if shape.experts % size == 0]
            raise UserError(f"--ep-size: {ep_size}: it does not divide the {shape.experts} experts; use one of {fits}")
    rows = []
    with scratch_folder() as folder:
        note(f"{shape.name}: writing the model")
        write_model(shape, seed, folder)
        for ep_size in dict.fromkeys(ep_sizes):
            note(f"{shape.name}: loading at ep_size {ep_size}")
            request = {"part": "load", "folder": str(folder), "ep_size": ep_size}
            found = run_on_ranks("fedmoe_ds.bench.memory.one_rank", request, ep_size)
            rows += [_row(shape, ep_size, rank, one) for rank, one in enumerate(found)]
    for row in rows:
        check_bound(row)
    return rows


def check_bound(row: Row) -> None:
    """The rank never held more than the dense part and its own experts."""
    if row["growth_mib"] > row["dense_mib"] + row["own_experts_mib"] + ALLOWANCE_MIB:
        raise TooMuchMemoryError(
            f"ep_size {row['ep_size']}, rank {row['rank']}: loading took {row['growth_mib']:.0f} MiB for "
            f"{row['dense_mib']:.0f} MiB of dense weights and {row['own_experts_mib']:.0f} MiB of own experts"
        )


def _row(shape: Shape, ep_size: int, rank: int, found: Row) -> Row:
    sizes = {key: found[key] for key in ("dense_mib", "own_experts_mib", "model_mib")}
    grown = found["peak_mib"] - found["before_mib"]
    return make_row(shape.name, OURS, found["peak_mib"], ep_size=ep_size, rank=rank, growth_mib=grown, **sizes, **shape.facts())


COMMAND = Command("load", "peak host memory per rank while a model is loaded", OPTIONS, run, COLUMNS, about=ABOUT)
