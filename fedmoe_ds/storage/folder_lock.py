"""Folder lock: one job at a time in a run folder, one study at a time in a folder of runs.

Two things say that a folder is taken. The holder has an advisory lock (flock) on a file in it, which the kernel releases with
the process, however that ends. And it gives signs of life: the file says who it is, is touched every `BEAT_S` seconds, and says
at the end that the holder has left. The lock decides on one host, and wherever locks hold between hosts. Some file systems keep
them to each host (NFS with `local_lock` or `nolock`, Lustre with `localflock`), or have none: whoever finds there a holder that
has not left watches for `PATIENCE_S`. A holder that gives signs of life keeps the folder, one that gives none is dead.

Times are compared for change alone, so clocks may differ. Two starts within the same moment are told apart by `confirm`. A
holder that was stopped for longer than `PATIENCE_S` finds the record of its run changed (`report.MetricsLog`), and ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedmoe_ds.errors import UserError
from fedmoe_ds.storage.files import open_plain
from fedmoe_ds.storage.strict_json import parse_json

NAME = "job.lock"
BEAT_S = 2.0
PATIENCE_S = 10.0
_LOOK_S = 0.25
_LONGEST = 4096
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_BOOT = Path("/proc/sys/kernel/random/boot_id")

Who = dict[str, Any]
"""What the file says about the last holder: process, host, boot, job, since, and left once it has."""


class FolderLock:
    """The lock of one start on its folder. Rank 0 only.

    Args:
        name: of the file.
        refusal: the error for the user, from the words that name the holder.
        unwritable: the same, from a path and why it cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        name: str = NAME,
        refusal: Callable[[str], UserError] | None = None,
        unwritable: Callable[[Path, str], UserError] | None = None,
    ) -> None:
        self.folder, self.path = folder, folder / name
        self._refusal, self._unwritable = refusal or self._in_use, unwritable or self._cannot_write
        self._handle: int | None = None
        self._me: Who = {"process": os.getpid(), "host": socket.gethostname(), "boot": boot(), "job": secrets.token_hex(8)}
        self._left = threading.Event()
        self._beats: threading.Thread | None = None

    @property
    def handle(self) -> int:
        """The descriptor that is locked; a child that inherits it holds the lock too."""
        assert self._handle is not None, "take the lock first"
        return self._handle

    def take(self) -> list[str]:
        """Take the lock; what the user should know about it.

        Raises:
            UserError: another job holds it, or the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(self.folder, error.strerror or str(error)) from None
        try:
            handle = open_plain(self.path, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise self._unwritable(self.path, error.strerror or str(error)) from None
        try:
            notes = self._obtain(handle)
        except BaseException:
            os.close(handle)
            raise
        self._handle = handle
        self._say({**self._me, "since": round(time.time())})
        self._beats = threading.Thread(target=self._beat, args=(handle,), name="folder-lock", daemon=True)
        self._beats.start()
        return notes

    def confirm(self) -> None:
        """Raise UserError where somebody else has taken the folder in the same moment, without a lock between the two."""
        # `since` is known only if this start could write its entry; without one there is nothing to compare.
        if self._handle is not None and "since" in self._me and (who := _read(self.path)).get("job") != self._me["job"]:
            raise self._refusal(words(who))

    def release(self) -> None:
        """Give the folder free; a second call does nothing."""
        handle, self._handle = self._handle, None
        if handle is None:
            return
        self._left.set()
        if self._beats is not None:
            # No sign of life may follow the word that the holder has left.
            self._beats.join()
        # Another job may have taken over while this process was stopped: then the entry is its own.
        if _read(self.path).get("job") == self._me["job"]:
            _write(handle, {**self._me, "left": round(time.time())})
        os.close(handle)

    def _obtain(self, handle: int) -> list[str]:
        """Lock, and make sure that the last holder is gone."""
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked, notes = True, []
        except BlockingIOError:
            raise self._refusal(words(_read(self.path))) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise self._unwritable(self.path, f"no lock: {error.strerror or error}") from None
            locked, notes = (
                False,
                [f"the file system of {self.folder} has no locks: a second job is known by its signs of life"],
            )
        who = _read(self.path)
        if not who or "left" in who or (locked and _was_here(who)):
            return notes
        self._watch(who)
        return [*notes, f"{words(who)}, has not said that it left {self.folder}, but gives no sign of life: taking over"]

    def _watch(self, who: Who) -> None:
        """Wait for a sign of life of the last holder. Raises UserError when there is one."""
        first, deadline = _sign(self.path), time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            time.sleep(_LOOK_S)
            if _sign(self.path) != first:
                raise self._refusal(words(_read(self.path) or who))

    def _beat(self, handle: int) -> None:
        while not self._left.wait(BEAT_S):
            with contextlib.suppress(OSError):
                # By descriptor: a file that somebody has put in its place is not touched.
                os.utime(handle)

    def _say(self, who: Who) -> None:
        if _write(self.handle, who):  # not on a full disk: the lock holds all the same
            self._me = who

    def _in_use(self, holder: str) -> UserError:
        return UserError(
            f"name: {self.folder.name}: {self.folder} is in use by a job that still runs ({holder}); wait for its end or "
            "stop it, or set another name"
        )

    def _cannot_write(self, path: Path, reason: str) -> UserError:
        return UserError(f"output: {path}: cannot be written: {reason}; mend that, or choose another output")


def boot() -> str:
    """What tells this start of this machine's kernel from every other; processes under it see each other's locks."""
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return socket.gethostname()


def words(who: Who) -> str:
    """Name a holder."""
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(who["since"]))
        return f"process {who['process']} on {who['host']}, since {since}"
    except (LookupError, TypeError, ValueError, OverflowError, OSError):
        return "which has not said its name"


def _was_here(who: Who) -> bool:
    """Whether the last holder ran where its lock would keep us out if it were alive. Earlier versions noted the host alone."""
    return bool(who["boot"] == boot() if "boot" in who else who.get("host") == socket.gethostname())


def _sign(path: Path) -> tuple[int, bytes] | None:
    """What changes with every sign of life. The file is opened anew each time: only that makes NFS ask its server."""
    try:
        with open(open_plain(path, os.O_RDONLY), "rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns, file.read(_LONGEST)
    except OSError:
        return None


def _read(path: Path) -> Who:
    """What the file says; nothing where it says nothing that can be read."""
    found = _sign(path)
    try:
        who = parse_json(found[1].partition(b"\n")[0]) if found else {}
    except ValueError:
        return {}
    return who if isinstance(who, dict) else {}


def _write(handle: int, who: Who) -> bool:
    """Put a line in the place of what the file says, without a moment in which it says nothing; whether that was possible."""
    line = (json.dumps(who) + "\n").encode()
    try:
        os.pwrite(handle, line, 0)
        os.ftruncate(handle, len(line))
        os.fsync(handle)
    except OSError:
        return False
    return True
