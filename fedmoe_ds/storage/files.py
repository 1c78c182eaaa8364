"""Files: how a run, a study or a plan writes into folders that others may be able to write to as well.

No symbolic link is followed: a text appears in one step in the place of what was there, be it a link; a file that grows is
opened only where it is a plain file. What a link names is never written, emptied or removed. Only the last part of a path
counts: the run folder itself, and every folder above it, may well be a link to a larger disk.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import tempfile
from pathlib import Path

from fedmoe_ds.errors import UserError
from fedmoe_ds.storage.file_modes import umask


def expanded(given: str, key: str) -> Path:
    """Return a path of the user's, with `~` as the home it stands for. Raises UserError for nobody's home."""
    try:
        return Path(given).expanduser()
    except RuntimeError:
        raise UserError(f"{key}: {given}: no such user's home; give another path") from None


def write_whole(path: Path, content: str | memoryview, private: bool = False) -> None:
    """Let a file appear in one step, in the place of an older one or of a symbolic link, with the mode that `open` gives; a
    `private` one is this user's alone.

    What UTF-8 cannot hold (half of a surrogate pair) is written as its escape.

    Raises:
        OSError: the folder cannot be written, the disk is full, or a folder, pipe or device is there; nothing is left behind.
    """
    check_replaceable(path)
    encoded = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    # In the same folder, because a rename is one step only within one file system.
    handle, draft = tempfile.mkstemp(prefix=".draft-", suffix=".tmp", dir=path.parent)
    try:
        with open(handle, "wb") as file:
            # mkstemp lets this user alone read.
            if not private:
                os.fchmod(handle, 0o666 & ~umask())
            file.write(encoded)
        os.replace(draft, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(draft)
        raise


def check_replaceable(path: Path, links: bool = True) -> None:
    """Raise OSError where `path` is neither absent nor a plain file nor, with `links`, a symbolic link."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISLNK(mode) and not links:
        raise OSError(errno.ELOOP, "is a symbolic link; name the file itself")
    if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
        raise OSError(errno.EINVAL, "is no plain file")


def open_plain(path: Path, flags: int) -> int:
    """Return the descriptor of a plain file, made where `flags` say so: never of what a link names, of a pipe or a device.

    Raises OSError.
    """
    try:
        # Without O_NONBLOCK a pipe that somebody has put there would keep us waiting for its other end.
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP and path.is_symlink():
            raise OSError(errno.ELOOP, "is a symbolic link; remove it") from None
        raise
    if stat.S_ISREG(os.fstat(handle).st_mode):
        os.set_blocking(handle, True)
        return handle
    os.close(handle)
    raise OSError(errno.EINVAL, "is no plain file; remove it")


def make_folder(path: Path) -> None:
    """Make a folder and those above it. Raises OSError, also where a symbolic link is in its place."""
    if path.is_symlink():
        raise OSError(errno.ELOOP, "is a symbolic link; remove it (the run folder itself may be one)")
    path.mkdir(parents=True, exist_ok=True)


def remove(path: Path) -> None:
    """Remove a folder with all that is in it, a file, or a link (not what it names), as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def sync(path: Path) -> None:
    """Bring a file's or folder's content to the disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_plain_name(name: object) -> bool:
    """Whether this is the name of a file in a folder, and of none elsewhere."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")
