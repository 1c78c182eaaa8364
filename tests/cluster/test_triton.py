"""Triton's kernels in a process that has Triton, which `make test-cluster` installs into a folder of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER, TESTS = Path(sys.prefix) / "triton", Path(__file__).parents[1]
# Kernels of one kind per file, and how many tests it has at least without a device.
LEAST = {"lora": 14, "grouped": 8, "rows": 31, "optimizer": 12, "launches": 4}

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]


def test_every_file_of_them_is_run() -> None:
    """Nowhere else in CI is there a Triton: a file that is not listed would be skipped everywhere."""
    assert {f"test_{kind}_triton.py" for kind in LEAST} == {path.name for path in TESTS.glob("test_*_triton.py")}


@pytest.mark.parametrize("kind", LEAST)
def test_kernels_without_a_device(kind: str) -> None:
    path = os.pathsep.join(filter(None, [str(FOLDER), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(TESTS / f"test_{kind}_triton.py")]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=380)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed, done.stdout[-3000:] + done.stderr[-1000:]
    assert int(passed[1]) >= LEAST[kind], done.stdout[-300:]
