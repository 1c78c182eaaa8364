"""Triton's kernels in a process that has Triton, which `make test-cluster` installs into a folder of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER, TESTS = (
    Path(sys.prefix) / "triton",
    [f"{Path(__file__).parents[1]}/test_{name}_triton.py" for name in ("lora", "grouped")],
)

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]


def test_kernels_without_a_device() -> None:
    path = os.pathsep.join(filter(None, [str(FOLDER), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *TESTS]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=380)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed, done.stdout[-3000:] + done.stderr[-1000:]
    assert int(passed[1]) >= 29, done.stdout[-300:]
