"""In use: which entries of the cache the processes of this machine work with, so that cleaning leaves those alone.

A process holds a shared lock (flock) on the folder of every entry that it has found or made, for as long as it lives; the
kernel releases the lock with the process, however that ends. Cleaning takes an exclusive one. Where a file system has no locks
nobody can tell who uses an entry, and cleaning leaves it. Where it keeps locks on each host, a job on another host is not seen:
like a damaged entry, what it has not opened yet is made anew at its next start.
"""

from __future__ import annotations

import fcntl
import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_MOST = 256
"""Entries that a process holds; a run has a few, a session of tests has hundreds and lets the oldest go."""

_held: OrderedDict[tuple[int, int], int] = OrderedDict()
"""(device, inode) of a folder -> the descriptor that is locked. By inode: a draft keeps its lock when it becomes an entry."""


def hold(entry: Path) -> bool:
    """Hold an entry for this process, and note that it was used now. False: the entry has gone in the meantime."""
    try:
        handle = os.open(entry, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return True  # whoever reads it will say what is wrong with it
    key = _place(os.fstat(handle))
    if key in _held:
        os.close(handle)
    else:
        with suppress(OSError):  # no locks here
            fcntl.flock(handle, fcntl.LOCK_SH)
        _held[key] = handle
        while len(_held) > _MOST:
            os.close(_held.popitem(last=False)[1])
    with suppress(OSError):
        os.utime(entry)  # its age counts from its last use; not possible where root keeps it for everybody
    try:
        # While this process waited for its lock, cleaning may have taken the folder away.
        return _place(os.stat(entry)) == key
    except OSError:
        return False


@contextmanager
def alone_with(entry: Path) -> Iterator[str | None]:
    """Nobody uses or finds an entry while the body runs. Yields why that cannot be had, or None."""
    # O_NOFOLLOW: a link is never followed to what it names.
    handle = os.open(entry, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        reason = None
    except BlockingIOError:
        reason = "in use"
    except OSError:
        reason = "this file system has no locks, so nobody can tell whether it is in use"
    try:
        yield reason
    finally:
        os.close(handle)


def _place(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino
