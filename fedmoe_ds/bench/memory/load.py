"""Load: peak host memory per rank while a model is loaded at several expert-parallel sizes, in real processes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedmoe_ds.bench.harness.process import Worker
from fedmoe_ds.bench.harness.shapes import Shape, find_shape, write_model
from fedmoe_ds.bench.harness.system import OURS
from fedmoe_ds.bench.harness.table import Row
from fedmoe_ds.distributed.launcher import free_port
from fedmoe_ds.errors import UserError
from fedmoe_ds.machine import machine_facts

# One batch of mapped file pages (64 MiB, see foundation.weight_files) and what Python needs for names and modules.
ALLOWANCE_MIB = 64 + 48

Note = Callable[[str], None]


class TooMuchMemoryError(Exception):
    """A rank held more than the dense part and its own experts."""


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
    with tempfile.TemporaryDirectory(prefix="fedmoe-bench-") as folder:
        note(f"{shape.name}: writing the model")
        write_model(shape, seed, Path(folder))
        for ep_size in dict.fromkeys(ep_sizes):
            note(f"{shape.name}: loading at ep_size {ep_size}")
            rows += [_row(shape, ep_size, rank, found) for rank, found in enumerate(_measure(Path(folder), ep_size))]
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


def _measure(folder: Path, ep_size: int) -> list[dict[str, float]]:
    port = str(free_port())
    ranks: list[Worker] = []
    try:
        for rank in range(ep_size):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ep_size)}
            ranks.append(Worker("load", {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}))
        for worker in ranks:
            worker.send(folder=str(folder), ep_size=ep_size)
        return [worker.receive() for worker in ranks]
    finally:
        for worker in ranks:
            worker.close()


def _row(shape: Shape, ep_size: int, rank: int, found: dict[str, float]) -> Row:
    row: dict[str, Any] = {
        "shape": shape.name,
        "system": OURS,
        "tokens_per_s": None,
        "peak_mib": found["peak_mib"],
        "floor_share": None,
        "ep_size": ep_size,
        "rank": rank,
        "growth_mib": found["peak_mib"] - found["before_mib"],
    }
    sizes = {key: found[key] for key in ("dense_mib", "own_experts_mib", "model_mib")}
    return {**row, **sizes, **shape.facts(), **machine_facts()}
