"""Memory of a host: what two ranks that hold the same foundation shard add to it, with one copy and with a copy each."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedmoe_ds.bench.harness.ranks import answers
from fedmoe_ds.bench.harness.shapes import Shape, write_model
from fedmoe_ds.bench.harness.system import OURS
from fedmoe_ds.bench.harness.table import Row
from fedmoe_ds.bench.rounds.jobs import SMALLEST_VOCABULARY
from fedmoe_ds.data.tokenizer import train_tokenizer
from fedmoe_ds.machine import machine_facts

PART = "host"
CHILD = "fedmoe_ds.bench.memory.one_rank"
RANKS = 2
SHARED, AGAIN, COPIES = "first start", "later start", "copies"
"""What is measured: the start that writes the shared file, one that finds it, and one whose cache folder is of no use."""

Note = Callable[[str], None]


def measure(shape: Shape, seed: int, note: Note) -> list[Row]:
    """One row per rank and start; two clusters of one rank each."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="fedmoe-bench-") as folder:
        write(shape, seed, Path(folder) / "model")
        unusable = Path(folder) / "no-folder"
        unusable.write_text("a file where a folder should be\n")
        cache = Path(folder) / "cache"
        for start, place in ((SHARED, cache), (AGAIN, cache), (COPIES, unusable)):
            note(f"{shape.name}: {RANKS} ranks load the same shard: {start}")
            tree = {"foundation": {"path": str(Path(folder) / "model"), "cache": str(place)}, "topology": {"device": "cpu"}}
            found = answers(CHILD, {"config": tree}, RANKS)
            rows += [_row(shape, start, rank, answer) for rank, answer in enumerate(found)]
    return rows


def write(shape: Shape, seed: int, folder: Path) -> None:
    """A random model of this shape, with a tokenizer, in `folder`."""
    shape = replace(shape, vocab=max(shape.vocab, SMALLEST_VOCABULARY))
    write_model(shape, seed, folder)
    train_tokenizer(["import this"], shape.vocab).save_pretrained(folder)


def _row(shape: Shape, start: str, rank: int, found: dict[str, Any]) -> Row:
    row = {
        "part": PART,
        "shape": shape.name,
        "system": OURS,
        "tokens_per_s": None,
        "peak_mib": found.pop("peak_mib"),
        "floor_share": None,
        "start": start,
        "rank": rank,
        "ranks": RANKS,
    }
    return {**row, **found, **shape.facts(), **machine_facts()}
