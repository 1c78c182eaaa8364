"""Memory of a host: what two ranks that hold the same foundation shard add to it, with one copy and with a copy each."""

from __future__ import annotations

from fedmoe_ds.bench.harness.command import Note
from fedmoe_ds.bench.harness.process import scratch_folder
from fedmoe_ds.bench.harness.ranks import run_on_ranks
from fedmoe_ds.bench.harness.repeats import make_row
from fedmoe_ds.bench.harness.shapes import Shape, write_with_tokenizer
from fedmoe_ds.bench.harness.system import OURS
from fedmoe_ds.bench.harness.table import Row

PART = "host"
RANKS = 2
SHARED, AGAIN, COPIES = "first start", "later start", "copies"
"""What is measured: the start that writes the shared file, one that finds it, and one whose cache folder is of no use."""


def measure_host(shape: Shape, seed: int, note: Note) -> list[Row]:
    """One row per rank and start; two clusters of one rank each."""
    rows = []
    with scratch_folder() as folder:
        model, cache, unusable = folder / "model", folder / "cache", folder / "no-folder"
        write_with_tokenizer(shape, seed, model, ["import this"])
        unusable.write_text("a file where a folder should be\n")
        for start, place in ((SHARED, cache), (AGAIN, cache), (COPIES, unusable)):
            note(f"{shape.name}: {RANKS} ranks load the same shard: {start}")
            tree = {"foundation": {"path": str(model), "cache": str(place)}, "topology": {"device": "cpu"}}
            found = run_on_ranks("fedmoe_ds.bench.memory.one_rank", {"part": "share", "tree": tree}, RANKS)
            rows += [_row(shape, start, rank, answer) for rank, answer in enumerate(found)]
    return rows


def _row(shape: Shape, start: str, rank: int, found: Row) -> Row:
    facts: Row = {"part": PART, "start": start, "rank": rank, "ranks": RANKS}
    return make_row(shape.name, OURS, found.pop("peak_mib"), **facts, **found, **shape.facts())
