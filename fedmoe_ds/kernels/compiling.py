"""Compiling: build a C++ source of this package for this processor, once per machine, and load it.

The sources have no dependencies, so compiling takes a second or two. A library is an entry of the cache under a hash of source,
flags, compiler and processor, with its sha256 beside it: one that is damaged, or that somebody else may have written, is never
loaded but built again. Where no cache can be had, every process builds its own, in a folder that goes with the build.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fedmoe_ds.errors import UserError
from fedmoe_ds.storage import cache

# Not -ffast-math: it lets the compiler reorder sums, and bits depend on their order. Without errno, sqrt is one instruction.
FLAGS = ["-O3", "-fno-math-errno", "-std=c++17", "-shared", "-fPIC"]
NATIVE = ("-march=native",)
"""All that this processor can do; kernels with classes of processors (`processor_class`) name instructions instead."""
LIBRARY, SUM = "library.so", "sha256"
"""Files of an entry: the library, and its sha256."""

POINTER, SIZE, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float

_INCLUDED = re.compile(rb'^#include "(\w+\.h)"', re.MULTILINE)
_loaded: dict[str, Built] = {}


@dataclass(frozen=True)
class Built:
    """A library that this process has loaded.

    Attributes:
        source: sha256 of the source with its headers, the flags for every processor and the compiler's version.
        code: sha256 of the library.
    """

    source: str
    code: str


@functools.cache
def library(name: str, *more_flags: str, instructions: tuple[str, ...] = NATIVE) -> ctypes.CDLL | None:
    """The compiled `<name>.cpp`, or None on a machine without a working g++ (a run then says which kernels it uses).

    Args:
        instructions: flags that name those which the compiler may use.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        return None
    source, flags = Path(__file__).with_name(f"{name}.cpp"), [*FLAGS, *more_flags]
    try:
        # Another compiler makes other code from the same source, so its version is part of the entry's name.
        version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
        recipe = hashlib.sha256(_text(source) + " ".join(flags).encode() + version).hexdigest()
        # Not part of the recipe: ranks of unlike processors may share a run whose bits are the same on both.
        kind = hashlib.sha256(" ".join(instructions).encode() + processor()).hexdigest()
        entry, command = f"{name}-{recipe[:24]}-{kind[:24]}", [compiler, *flags, *instructions, str(source), "-o"]
        try:
            found, code = _found_or_built(cache.place(cache.root(None), "native") / entry, command)
        except (OSError, UserError) as error:  # it cannot be written, the disk is full, or nothing may be run from there
            cache.pass_over(f"compiled kernels are not kept ({error}): every process builds its own")
            with tempfile.TemporaryDirectory(prefix="fedmoe-native-") as working:
                found, code = _found_or_built(Path(working) / "native" / entry, command)
    # A compiler that fails is as good as none: the run goes on with torch's operations and says so.
    except (OSError, subprocess.CalledProcessError):
        return None
    _loaded[name] = Built(recipe, code)
    return found


def _text(source: Path) -> bytes:
    """A source and the headers of this folder that it includes."""
    text = source.read_bytes()
    return text + b"".join(_text(source.with_name(name.decode())) for name in _INCLUDED.findall(text))


def loaded() -> dict[str, Built]:
    """Every library that this process has loaded, by name."""
    return dict(_loaded)


def _found_or_built(entry: Path, command: list[str]) -> tuple[ctypes.CDLL, str]:
    """The library of an entry and its sha256; built unless it is there, intact, and nobody else's.

    Raises:
        OSError: it cannot be written or loaded.
        CalledProcessError: the compiler fails.
    """

    def good() -> bool:
        return cache.usable(entry, lambda: _digest(entry) is not None)

    if not good():
        with cache.draft(entry, good) as content:
            subprocess.run([*command, str(content / LIBRARY)], capture_output=True, check=True)
            (content / SUM).write_text(hashlib.sha256((content / LIBRARY).read_bytes()).hexdigest())
    # Read back before it is loaded: what runs is what was hashed, also where the disk or another writer changed it meanwhile.
    digest = _digest(entry)
    if digest is None:
        raise OSError(f"{entry}: what was built does not stay as it was written")
    # CDLL and not PyDLL: the lock of the interpreter is released in a call, so the watchdog's thread runs on.
    return ctypes.CDLL(str(entry / LIBRARY)), digest


def _digest(entry: Path) -> str | None:
    """The sha256 of an entry's library; None where it is not the one that was built."""
    try:
        content, promised = (entry / LIBRARY).read_bytes(), (entry / SUM).read_text()
    except (OSError, UnicodeDecodeError):
        return None
    digest = hashlib.sha256(content).hexdigest()
    return digest if digest == promised else None


def processor_key() -> str:
    """A hash of `processor`."""
    return hashlib.sha256(processor()).hexdigest()


def processor() -> bytes:
    """What compilers look at, so that nodes of different kinds may share a cache folder."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return os.uname().machine.encode()
    # A set: every core repeats its lines, and how many cores there are decides no code.
    return b"\n".join(sorted({line for line in lines if line.startswith((b"flags", b"Features", b"model name"))}))
