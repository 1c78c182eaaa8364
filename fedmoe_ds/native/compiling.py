"""Compiling: build a C++ source of this package for this processor, once per machine, and load it.

The sources have no dependencies, so compiling takes a second or two. A library lies in the cache folder under a hash of source,
flags, compiler and processor; it appears there whole or not at all.
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

FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-std=c++17", "-shared", "-fPIC"]

POINTER, SIZE, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


@functools.cache
def library(name: str, *more_flags: str) -> ctypes.CDLL | None:
    """The compiled `<name>.cpp`, or None on a machine without a working g++ (a run then says which kernels it uses)."""
    compiler = shutil.which("g++")
    if compiler is None:
        return None
    try:
        return ctypes.CDLL(str(_built(Path(__file__).with_name(f"{name}.cpp"), compiler, [*FLAGS, *more_flags])))
    except (OSError, subprocess.CalledProcessError):
        return None


def _built(source: Path, compiler: str, flags: list[str]) -> Path:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    key = hashlib.sha256(source.read_bytes() + " ".join(flags).encode() + version + processor()).hexdigest()[:24]
    folder = Path(os.environ.get("FEDMOE_CACHE") or "~/.cache/fedmoe_ds").expanduser() / "native"
    target = folder / f"{source.stem}-{key}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as working:
            fresh = Path(working) / f"{source.stem}.so"
            subprocess.run([compiler, *flags, str(source), "-o", str(fresh)], capture_output=True, check=True)
            fresh.rename(target)
    return target


def processor() -> bytes:
    """What -march=native looks at, so that nodes of different kinds may share a cache folder."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return os.uname().machine.encode()
    return b"\n".join(sorted({line for line in lines if line.startswith((b"flags", b"Features", b"model name"))}))
