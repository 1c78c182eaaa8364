"""The planner against this machine: calibrate, then real runs on 1, 2 and 4 ranks of three shapes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

BENCH = Path(__file__).parents[2] / "launch" / "bench.py"
ROUND_TOLERANCE, MEMORY_TOLERANCE = 0.20, 0.10
SHAPES, RANKS, ATTEMPTS = ("short", "narrow", "long"), (1, 2, 4), 4
CALIBRATE_S, PLAN_S, GRACE_S = 400, 900, 10

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(ATTEMPTS * (CALIBRATE_S + PLAN_S) + 60)]


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


def is_close(row: dict[str, Any]) -> bool:
    near = abs(row["round_ratio"] - 1.0) <= ROUND_TOLERANCE
    return near and abs(row["memory_ratio"] - 1.0) <= MEMORY_TOLERANCE


def test_round_time_and_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Something else on the machine disturbs calibration and run alike; what is off is calibrated and measured once more."""
    waiting, close = {(shape, ranks) for shape in SHAPES for ranks in RANKS}, {}
    calibration, target = tmp_path / "here.json", tmp_path / "rows.json"
    for _ in range(ATTEMPTS):
        bench(tmp_path / "cache", CALIBRATE_S, "calibrate", "--json", str(calibration))
        words = ["--case", *sorted({shape for shape, _ in waiting}), "--ranks", *map(str, sorted({n for _, n in waiting}))]
        shown = bench(
            tmp_path / "cache", PLAN_S, "plan", "--hardware", str(calibration), "--rounds", "3", *words, "--json", str(target)
        )
        with capsys.disabled():
            print(f"\n{shown}")
        rows: list[dict[str, Any]] = json.loads(target.read_text())["rows"]
        close |= {(row["shape"], row["ranks"]): row for row in rows if is_close(row)}
        waiting -= close.keys()
        if not waiting:
            break
    assert not waiting, f"not within {ROUND_TOLERANCE} and {MEMORY_TOLERANCE}: {sorted(waiting)}"
