"""The planner against this machine: calibrate, then real runs on 1, 2 and 4 ranks of three shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

BENCH = Path(__file__).parents[2] / "launch" / "bench.py"
ROUND_TOLERANCE, MEMORY_TOLERANCE = 0.20, 0.10


def bench(cache: Path, *words: str) -> str:
    variables = {**os.environ, "FEDMOE_CACHE": str(cache), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, str(BENCH), *words], capture_output=True, text=True, timeout=500, env=variables)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_round_time_and_memory(tmp_path: Path) -> None:
    calibration, target = tmp_path / "here.json", tmp_path / "rows.json"
    bench(tmp_path / "cache", "calibrate", "--json", str(calibration))
    shown = bench(tmp_path / "cache", "plan", "--hardware", str(calibration), "--rounds", "2", "--json", str(target))
    rows: list[dict[str, Any]] = json.loads(target.read_text())
    assert {(row["shape"], row["ranks"]) for row in rows} == {(s, n) for s in ("short", "narrow", "long") for n in (1, 2, 4)}
    off = [row for row in rows if abs(row["round_ratio"] - 1.0) > ROUND_TOLERANCE]
    heavy = [row for row in rows if abs(row["memory_ratio"] - 1.0) > MEMORY_TOLERANCE]
    assert not off and not heavy, shown
