"""Machine: what a measurement ran on, and the memory of a process."""

from __future__ import annotations

import os
import platform
import resource
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_MEMORY = Path("/proc/meminfo")
_CPU = Path("/proc/cpuinfo")
_PACKAGES = ("torch", "transformers", "peft", "deepspeed", "fedmoe-ds")


def peak_mib() -> float:
    """Peak resident memory of this process.

    On Linux `ru_maxrss` starts from the parent's, even through exec; VmHWM belongs to this program alone.
    """
    found = _field(_STATUS, "VmHWM:")
    if found is not None:
        return int(found.split()[0]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024  # bytes on macOS, KiB elsewhere


def device_peak_mib() -> float:
    """Peak memory of this process's tensors on its GPU."""
    import torch

    return torch.cuda.max_memory_allocated() / 2**20


def resident_mib() -> float:
    """Resident memory now, and the point from which `peak_mib` counts where the system can reset its mark."""
    if _CLEAR.exists():
        _CLEAR.write_text("5")  # resets VmHWM to the present size (proc(5))
    return peak_mib()


def available_mib() -> float:
    """Memory that a new process could use, what the system would give up for it included."""
    found = _field(_MEMORY, "MemAvailable:")
    if found is not None:
        return int(found.split()[0]) / 1024
    # Without /proc only the size of the whole memory is known.
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20


def machine_facts() -> dict[str, Any]:
    """Hardware and versions, for every row of a result."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": 1,
        "gpu": _gpu(),
        "system_name": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
    }


def host_facts() -> dict[str, Any]:
    """What a host of a run is: every rank may ask, without the versions, which are the same for all."""
    return {
        "host": socket.gethostname(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "gpu": _gpu(),
        "system_name": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def commit() -> str | None:
    """The commit of the repository that this package is worked on in, with `+` where files differ; None of an installed one."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=20)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):  # no git here, or a repository of somebody else
        return None


def _gpu() -> dict[str, Any] | None:
    """The GPUs that this process may use; None where there is none, or where DeepSpeed was told to leave them alone."""
    import torch

    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return None
    return {"name": torch.cuda.get_device_name(0), "count": torch.cuda.device_count(), "cuda": torch.version.cuda}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    found = _field(_CPU, "model name")
    return found.lstrip(": \t") if found else platform.processor() or platform.machine()


def _field(file: Path, name: str) -> str | None:
    """The rest of the first line of a /proc file that begins with a name; None where there is no such file or line."""
    if not file.exists():
        return None
    lines = (line for line in file.read_text().splitlines() if line.startswith(name))
    return next((line.removeprefix(name).strip() for line in lines), None)
