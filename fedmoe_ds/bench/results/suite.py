"""`launch/bench.py all`: the measurements behind the table of targets, one after the other, then the table.

Every measurement is a process of its own, one after the other: nothing is timed beside anything else.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedmoe_ds.bench.harness.command import Note, Report, option
from fedmoe_ds.bench.harness.document import read_documents
from fedmoe_ds.bench.harness.process import kill_process_tree, start
from fedmoe_ds.bench.results.targets_command import REASONS_OPTION, read_reasons, targets_table
from fedmoe_ds.errors import UserError, nearest
from fedmoe_ds.report import formats
from fedmoe_ds.storage.files import open_plain

SCRIPT = Path(__file__).parents[2] / "commands" / "bench.py"


@dataclass(frozen=True)
class Measurement:
    """Arguments of launch/bench.py: as the project reports them, and with the least work that still goes through everything."""

    arguments: str
    quick: str

    @property
    def benchmark(self) -> str:
        """The subcommand."""
        return self.arguments.split()[0]


_SMALL = "--shape tiny --steps 1 --rounds 1 --length 16 --mode fast"
_LONGER = "--sequences 1 4 8 --mode fast --peers grouped_mm"
SUITE = {
    "wave-e32": Measurement("wave --shape e32", f"wave {_SMALL} --peers grouped_mm"),
    "wave-e64": Measurement("wave --shape e64", f"wave {_SMALL} --peers"),
    "wave-e32-bf16": Measurement("wave --shape e32 --dtype bfloat16", f"wave {_SMALL} --dtype bfloat16 --peers grouped_mm"),
    "wave-e64-bf16": Measurement("wave --shape e64 --dtype bfloat16", f"wave {_SMALL} --dtype bfloat16 --peers"),
    "wave-e32-tokens": Measurement(f"wave --shape e32 {_LONGER}", f"wave {_SMALL} --sequences 1 2 --peers grouped_mm"),
    "wave-e64-tokens": Measurement(f"wave --shape e64 {_LONGER} --rounds 3", f"wave {_SMALL} --sequences 1 2 --peers"),
    "peers": Measurement("peers", f"peers {_SMALL} --systems deepspeed"),  # Flower needs an environment of its own
    "round": Measurement("round", "round --parts k --k-shape tiny --k-sequences 1 --k-steps 1 --rounds 1 --length 16"),
    "aggregate": Measurement("aggregate", "aggregate --mib 1 --rounds 1"),
    "memory": Measurement("memory", "memory --parts clients --shape tiny --clients 1 2 --length 16 --mode fast --peers"),
    "load": Measurement("load", "load --shape load-tiny --ep-size 1"),
    "experts": Measurement("experts", "experts --experts 4 --steps 1 --rounds 1 --clients 1 --sequences 1 --length 16"),
}
"""By the name of the stored file."""


def chosen(only: list[str] | None, suite: Mapping[str, Measurement] = SUITE) -> list[str]:
    """The measurements with these names or of these subcommands; all where None. Raises UserError for an unknown one."""
    words = {*suite, *(measurement.benchmark for measurement in suite.values())}
    for word in only or []:
        if word not in words:
            raise UserError(f"--only: {word}: neither a measurement nor a subcommand of one{nearest(word, words)}")
    return [name for name, one in suite.items() if only is None or name in only or one.benchmark in only]


def make_folder(folder: Path) -> None:
    """Find out before the first measurement whether results can be stored. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: {folder}: cannot be made: {error.strerror or error}; give another folder") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output: {folder}: cannot be written; give another folder")


def run_suite(names: list[str], folder: Path, quick: bool, note: Note, suite: Mapping[str, Measurement] = SUITE) -> list[str]:
    """Store `<name>.json` for every measurement, or what it said in `<name>.log`. Returns the names of those that failed."""
    failed = []
    for place, name in enumerate(names, start=1):
        arguments = suite[name].quick if quick else suite[name].arguments
        note(f"{place} of {len(names)}: {name}: python launch/bench.py {arguments}")
        began = time.monotonic()
        problem = _run(name, arguments.split(), folder)
        if problem is None:
            note(f"{name}: {formats.duration(time.monotonic() - began)}")
        else:
            note(f"{name}: failed: {problem} ({folder / name}.log)")
            failed.append(name)
    return failed


def _run(name: str, arguments: list[str], folder: Path) -> str | None:
    """Run one measurement; the reason where it failed. An earlier result goes first: it must not pass for this run's."""
    target, log = folder / f"{name}.json", folder / f"{name}.log"
    target.unlink(missing_ok=True)
    with open(open_plain(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as out:
        # The command decides on threads and devices itself: a wave may be for a GPU.
        process = start([sys.executable, str(SCRIPT), *arguments, "--json", str(target)], out, os.environ)
        try:
            code = process.wait()
        finally:
            kill_process_tree(process)
    if code == 0:
        log.unlink()
        return None
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f"exit code {code}: {lines[-1].strip() if lines else 'it said nothing'}"


def run(args: argparse.Namespace, note: Note) -> tuple[str, int]:
    reasons = read_reasons(args.reasons)
    names = chosen(args.only)
    make_folder(args.output)
    failed = run_suite(names, args.output, args.quick, note)
    return targets_table(read_documents(args.output), reasons).text() + "\n", 1 if failed else 0


OPTIONS = (
    option("--output", None, "folder of the results; made where missing", type=Path, required=True, metavar="FOLDER"),
    option("--only", None, f"some of: {', '.join(SUITE)}; or subcommands", nargs="+", metavar="NAME"),
    option("--quick", False, "as little work as goes through everything; figures mean nothing"),
    REASONS_OPTION,
)
REPORT = Report("all", "every measurement behind the targets, one after the other", OPTIONS, run)
