"""Library: device.cpp, compiled once per version of torch, and loaded before torch asks for CUDA's hooks.

The build lies in a folder of this user's below the system's temporary folder, never in the source tree.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("device.cpp")
FLAGS = ("-O1", "-std=c++20", "-shared", "-fPIC")


def compiler() -> str | None:
    """The C++ compiler of the stand-in; None: it cannot be had on this machine."""
    return shutil.which("g++")


@functools.cache
def load() -> ctypes.CDLL:
    """Compile and load the library into this process. It must not have imported torch: torch asks for CUDA's hooks once."""
    assert "torch" not in sys.modules, "enable the stand-in before anything imports torch"
    torch_folder = _torch_folder()
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(torch_folder / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(build()))


def build() -> Path:
    """The compiled library; of several processes at once each compiles, and the last rename stays."""
    torch_folder, gxx = _torch_folder(), compiler()
    assert gxx is not None, "no g++"
    recipe = SOURCE.read_bytes() + " ".join(FLAGS).encode() + importlib.metadata.version("torch").encode()
    target = _folder() / f"{hashlib.sha256(recipe).hexdigest()[:24]}.so"
    if not target.exists():
        fresh = target.with_suffix(f".{os.getpid()}")
        headers = (torch_folder / "include", torch_folder / "include/torch/csrc/api/include")
        command = [gxx, *FLAGS, *(f"-I{header}" for header in headers), str(SOURCE), "-o", str(fresh)]
        subprocess.run([*command, f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu"], check=True)
        fresh.rename(target)
    return target


def _torch_folder() -> Path:
    found = importlib.util.find_spec("torch")  # finds it without importing it
    assert found is not None and found.origin is not None
    return Path(found.origin).parent


def _folder() -> Path:
    """Where nobody else can have put a library: the name is known, and the temporary folder is everybody's."""
    folder = Path(tempfile.gettempdir()) / f"fedmoe-fake-cuda-{os.geteuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    state = folder.lstat()
    assert stat.S_ISDIR(state.st_mode) and state.st_uid == os.geteuid() and not state.st_mode & 0o022, folder
    return folder
