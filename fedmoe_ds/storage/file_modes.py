"""File modes: who may read what this package writes, and who may have written what it finds.

* Results follow the user's umask, for files that libraries make as for our own: metrics with clients' names, reports, global
  adapters. With a umask of 027 a group may read them.
* What is a client's own is this user's alone, whatever the umask: prepared text and images in the cache; in checkpoints the
  personal adapters, the clients' state, and the sums of an unfinished round, which may be those of one client; metrics and
  report of a run that shows answers (`evaluation.generations`).
* The rest of the cache follows the umask as far as reading goes, but nobody else may write: who writes there decides what runs.

safetensors and `tempfile.mkdtemp` keep to the one user what they make, hence `follow_umask`. What only ranks may know
(`watchdog`) is never in a file.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

_STATUS = Path("/proc/self/status")
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def follow_umask(path: Path) -> None:
    """Give a file or folder the mode that plain `open` or `mkdir` would have given it.

    Raises:
        OSError: it is not there, or of another user.
    """
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask())


def keep_private(path: Path) -> None:
    """Let this user alone read and write a file or folder. Raises OSError as `follow_umask`."""
    path.chmod(0o700 if path.is_dir() else 0o600)


def keep_from_writers(path: Path) -> None:
    """Let others read a file or folder as far as the umask does, and write never. Raises OSError as `follow_umask`."""
    path.chmod((0o755 if path.is_dir() else 0o644) & ~umask())


def doubt(path: Path) -> str | None:
    """Why somebody else may have written what lies here; None where only this user and root can, or nothing is there.

    Owner and mode tell; an access list of POSIX shows in the group's bits. The folders above are not looked at.
    """
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return f"{path} cannot be looked at ({error.strerror or error})"
    if found.st_uid not in (0, os.geteuid()):
        return f"{path} belongs to user {found.st_uid}, and this is user {os.geteuid()}"
    if found.st_mode & _OTHERS_WRITE:
        return f"{path} can be written by its group or by everybody (mode {stat.S_IMODE(found.st_mode):o}; chmod -R go-w)"
    return None


def umask() -> int:
    """This process's umask. Read where possible: asking the system for it means to set it, for all threads, for a moment."""
    try:
        found = re.search(r"^Umask:\s*([0-7]+)$", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found is not None:
        return int(found[1], 8)
    # The strictest mask, for what other threads create in this moment.
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
