"""Native: compile and load `lowrank.cpp` for this processor, once per machine.

The source has no dependencies, so compiling takes a second or two. The library lies in the cache folder under a hash of the
source, the flags, the compiler and the processor; it appears there whole or not at all.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("lowrank.cpp")
FLAGS = ["-O3", "-march=native", "-std=c++17", "-shared", "-fPIC"]
RANKS = (4, 8, 16, 32)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled products, or None on a machine without a working g++ (the log then names the kernel in use)."""
    compiler = shutil.which("g++")
    if compiler is None:
        return None
    try:
        loaded = ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.CalledProcessError):
        return None
    for name in ("project", "expand", "back_project", "back_expand", "grad_a", "grad_b"):
        scaled = [ctypes.c_float] if name in ("project", "back_project") else []
        getattr(loaded, name).argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 4 + scaled
    return loaded


def _built(compiler: str) -> Path:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join(FLAGS).encode() + version + _processor()).hexdigest()[:24]
    folder = Path(os.environ.get("FEDMOE_CACHE") or "~/.cache/fedmoe_ds").expanduser() / "native"
    target = folder / f"lowrank-{key}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as working:
            fresh = Path(working) / "lowrank.so"
            subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(fresh)], capture_output=True, check=True)
            fresh.rename(target)
    return target


def _processor() -> bytes:
    """What -march=native looks at, so that nodes of different kinds may share a cache folder."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return os.uname().machine.encode()
    return b"\n".join(sorted({line for line in lines if line.startswith((b"flags", b"Features", b"model name"))}))
