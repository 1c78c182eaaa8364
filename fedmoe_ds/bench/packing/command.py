"""`launch/bench.py packing`: the same steps on short samples, packed and unpacked, side by side."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from fedmoe_ds.bench.harness.checks import check_least
from fedmoe_ds.bench.harness.command import SEED, Command, Note, option, values_of
from fedmoe_ds.bench.harness.process import scratch_folder
from fedmoe_ds.bench.harness.program import Program, alternate, workers
from fedmoe_ds.bench.harness.repeats import make_row, paired, shown
from fedmoe_ds.bench.harness.shapes import find_shape, write_model
from fedmoe_ds.bench.harness.system import check_agreement
from fedmoe_ds.bench.harness.table import Column, Row, percent, two_digits, whole
from fedmoe_ds.bench.packing.systems import WHOLE, settings_of, system_name
from fedmoe_ds.bench.packing.workload import PackingWorkload

COLUMNS: list[Column] = [
    ("system", lambda row: row["system"]),
    ("passes", lambda row: str(row["passes"])),
    ("padding", lambda row: percent(row["padding"])),
    ("tokens/s", lambda row: shown(row, "tokens_per_s", whole)),
    ("time / packed", lambda row: shown(row, "ratio", two_digits)),
    ("CPU / packed", lambda row: shown(row, "cpu_ratio", two_digits)),
    ("peak MiB", lambda row: whole(row["peak_mib"])),
]

ABOUT = (
    "Eight clients in one wave train LoRA on experts and attention of a random OLMoE-shaped model on samples of 30 to 60 "
    "tokens. *Packed* and *unpacked* take the same optimizer steps on the same samples. *whole steps*: a step in one pass; a "
    "number: `execution.micro_batch_size`, the full sequences (of 512 tokens) that a pass has memory for. Unpacked, "
    "a sample takes the place of one; a pass is padded to its longest sample, not to a full sequence. *Padding* is the share "
    "of a pass's token rows."
)

OPTIONS = (
    option("--shape", "e32", "e32, e64 or tiny"),
    option("--clients", 8, "clients in flight"),
    option("--samples", 32, "samples per client and step"),
    option("--shortest", 30, "tokens of the shortest sample"),
    option("--longest", 60, "tokens of the longest sample"),
    option("--length", 512, "tokens of a full sequence"),
    option("--micro", [1, 4], "micro-batch sizes beside whole steps", nargs="*"),
    option("--steps", 1, "local steps per client in a timed wave"),
    option("--rounds", 3, "alternating repeats; medians are reported"),
    SEED,
)


def run(args: argparse.Namespace, note: Note) -> list[Row]:
    names = ("clients", "steps", "samples", "shortest", "longest", "length", "seed")
    return run_packing(PackingWorkload(find_shape(args.shape), **values_of(args, *names)), args.micro, args.rounds, note)


def run_packing(workload: PackingWorkload, micro: list[int], rounds: int, note: Note) -> list[Row]:
    """Measure every size of a pass packed and unpacked, in alternating rounds after one warm-up.

    Raises:
        UserError: no round, or no sequence in a pass.
        DisagreementError: their losses differ, so they do not take the same steps.
    """
    check_least("--rounds", rounds)
    for size in micro:
        check_least("--micro", size)
    sizes: list[int | None] = [None, *dict.fromkeys(micro)]
    names = [system_name(packing, size) for size in sizes for packing in (False, True)]
    with scratch_folder() as folder, workers("fedmoe_ds.bench.packing.systems", names) as running:
        write_model(workload.shape, workload.seed, folder)
        for name, program in running.items():
            note(f"{name}: loading and warm-up")
            program.ask(do="open", folder=str(folder), workload=workload.to_json())
        # The compared wave is the warm-up as well: it is not timed.
        check_agreement({name: program.ask(do="measure")["losses"] for name, program in running.items()})
        return _rows(workload, alternate(running, rounds, note, do="measure"), running)


def _rows(workload: PackingWorkload, found: dict[str, list[dict[str, Any]]], running: dict[str, Program]) -> list[Row]:
    rows, tokens = [], workload.tokens
    for name, many in found.items():
        packing, micro = settings_of(name)
        packed = found[system_name(True, micro)]
        wall, cpu = ([one[clock] for one in many] for clock in ("wall", "cpu"))
        samples = {
            "tokens_per_s": [tokens / seconds for seconds in wall],
            "ratio": paired(wall, [one["wall"] for one in packed]),
            "cpu_ratio": paired(cpu, [one["cpu"] for one in packed]),
        }
        passes, padding = many[0]["passes"], 1.0 - tokens / many[0]["rows"]
        facts = {**workload.facts(), "tokens": tokens, "passes": passes, "padding": padding}
        more = {**facts, "packing": packing, "micro_batch_size": micro, "wall_seconds": wall, "cpu_seconds": cpu}
        rows.append(make_row(workload.shape.name, name, running[name].ask(do="peak"), samples, **more))
    return rows


def lines(rows: list[Row]) -> Iterator[str]:
    """For every size of a pass, how many times as fast packing is."""
    for row in rows:
        if not row["packing"]:
            size = WHOLE if row["micro_batch_size"] is None else f"micro_batch_size={row['micro_batch_size']}"
            yield f"{size}: packed runs {shown(row, 'ratio', two_digits)} times as fast"


HELP = "the same steps on short samples, packed and unpacked"
COMMAND = Command("packing", HELP, OPTIONS, run, COLUMNS, lines=lines, about=ABOUT)
