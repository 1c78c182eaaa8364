"""Modes: who may read what a run writes. The user's umask says so, for files that libraries make as for our own.

safetensors and `tempfile.mkdtemp` keep to the one user what they make. Nothing that this package writes is private: what only
ranks may know (`watchdog`) is never in a file.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_STATUS = Path("/proc/self/status")


def follow_umask(path: Path) -> None:
    """Give a file or folder the mode that plain `open` or `mkdir` would have given it.

    Raises:
        OSError: it is not there, or of another user.
    """
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask())


def umask() -> int:
    """This process's umask. Read where possible: asking the system for it means to set it, for all threads, for a moment."""
    try:
        found = re.search(r"^Umask:\s*([0-7]+)$", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found is not None:
        return int(found[1], 8)
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
