"""Folder lock: one job at a time in a run folder.

Rank 0 holds an advisory lock (flock) on a file in the folder for as long as it lives. The kernel releases it with the process,
however that ends, so a lock cannot be left behind. The file only says who holds it.

Not covered: a file system that has no locks or keeps them on each host (NFS mounted with `nolock` or `local_lock`, Lustre
without `flock`); where the system says that it has none, the user is told. Of a job whose rank 0 was killed, other ranks may
live until the watchdog ends them; they publish nothing.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path

from fedmoe_ds.errors import UserError
from fedmoe_ds.strict_json import parse_json

NAME = "job.lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class FolderLock:
    """The lock of one start on its run folder. Rank 0 only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._handle: int | None = None

    def take(self) -> list[str]:
        """Take the lock; what the user should know about it.

        Raises:
            UserError: another job holds it, or the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.folder / NAME, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(f"output: {self.folder}: cannot create the run folder: {error.strerror or error}") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(handle)
            os.close(handle)
            raise UserError(
                f"name: {self.folder.name}: {self.folder} is in use by a job that still runs ({holder}); wait for its end or "
                "stop it, or set another name"
            ) from None
        except OSError as error:
            os.close(handle)
            if error.errno not in _NO_LOCKS:
                raise UserError(f"output: {self.folder / NAME}: cannot be locked: {error.strerror or error}") from None
            return [f"the file system of {self.folder} has no locks: nothing keeps a second job out of this folder"]
        self._handle = handle
        _say_who(handle)
        return []

    def release(self) -> None:
        """Give the folder free; a second call does nothing."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def _say_who(handle: int) -> None:
    who = {"process": os.getpid(), "host": socket.gethostname(), "since": round(time.time())}
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, (json.dumps(who) + "\n").encode(), 0)
    except OSError:  # a full disk: the lock holds all the same
        return


def _holder(handle: int) -> str:
    try:
        who = parse_json(os.pread(handle, 4096, 0))
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(who["since"]))
        return f"process {who['process']} on {who['host']}, since {since}"
    except (OSError, ValueError, LookupError, TypeError, OverflowError):
        return "which has not said its name"
