"""The planner against real runs of this machine: calibrate, then the real command on 1, 2 and 4 ranks of two shapes.

Memory, calls and bytes are asked for, because nothing else on the machine changes them. How close the predicted time is belongs
to `launch/bench.py plan`: another load moves its ratios, and no bound would be both kept and worth keeping.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

BENCH = Path(__file__).parents[2] / "launch" / "bench.py"
MEMORY_TOLERANCE, BYTES_TOLERANCE = 0.10, 0.15
ROWS_TOLERANCE = 0.40
"""Of the bytes of rows on their way to experts, on rank 0: of six clients on four ranks it has two, a third over its share."""
MESSAGES = 2
"""By which the control plane's calls in a round may differ: a checkpoint is finished in this round or in the next."""
SHAPES, RANKS = ("narrow", "long"), (1, 2, 4)
CALIBRATE_S, PLAN_S, GRACE_S = 400, 900, 10

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(CALIBRATE_S + PLAN_S + 60)]


def bench(cache: Path, limit_s: float, *words: str) -> str:
    """Run launch/bench.py in a session of its own; nothing of it outlives this call."""
    variables = {**os.environ, "FEDMOE_CACHE": str(cache), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, str(BENCH), *words]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables, start_new_session=True
    )
    with process:
        try:
            out, err = process.communicate(timeout=limit_s)
        finally:
            end(process)
    assert process.returncode == 0, err[-3000:]
    return out


def end(process: subprocess.Popen[str]) -> None:
    """End it if it is still there, and all below it: torchrun gives its ranks sessions, so no group holds them all."""
    if process.poll() is not None:
        return
    family = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)
    for member in psutil.wait_procs(family, timeout=GRACE_S)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def test_memory_calls_and_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calibration, target = tmp_path / "here.json", tmp_path / "rows.json"
    bench(tmp_path / "cache", CALIBRATE_S, "calibrate", "--json", str(calibration))
    words = ["--case", *SHAPES, "--ranks", *map(str, RANKS), "--rounds", "2", "--json", str(target)]
    shown = bench(tmp_path / "cache", PLAN_S, "plan", "--hardware", str(calibration), *words)
    with capsys.disabled():
        print(f"\n{shown}")
    rows: list[dict[str, Any]] = json.loads(target.read_text())["rows"]
    assert {(row["shape"], row["ranks"]) for row in rows} == {(shape, ranks) for shape in SHAPES for ranks in RANKS}
    for row in rows:
        assert abs(row["memory_ratio"] - 1.0) <= MEMORY_TOLERANCE, row
        assert row["round_ratio"] > 0 and set(row["predicted_phases"]) == {"schedule", "train", "aggregate", "evaluate"}, row
        measured, predicted = row["collectives"], row["predicted_collectives"]
        assert {*measured} == {*predicted} and ("control" in measured) == (row["ranks"] > 1), row
        for name, tally in predicted.items():
            # Only the control plane is not called the same number of times in every round.
            assert abs(tally["calls"] - measured[name]["calls"]) <= (MESSAGES if name == "control" else 1e-9), (name, row)
            # What the control plane carries is text of any length.
            most = {"control": math.inf, "all_to_all": ROWS_TOLERANCE}.get(name, BYTES_TOLERANCE)
            assert abs(tally["bytes"] / measured[name]["bytes"] - 1.0) <= most, (name, row)
