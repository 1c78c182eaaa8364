"""Cache: what later starts find again, entries `<root>/<kind>/<key>`: how they appear, whom they are trusted from, how they go.

An entry is a folder. It appears in one rename, whole or not at all. It is used where nobody but this user and root can have
written it, as owner and mode say of all that is in it and of the folders from the root down (`file_modes.doubt`); a checksum
that lies beside data tells what a disk did, not who wrote them. What is in doubt, or damaged, is passed over, told once, and
made anew. The folders above the root are the user's business: nobody else should be able to rename in them.

A writer works in a draft, a folder beside the entry, and holds a lock (flock) in it. The kernel releases the lock with the
process, however that ends, so a draft without one has lost its writer, and whoever uses the cache next removes it. Not covered,
as in `folder_lock`: where a file system has no locks, the drafts of killed writers stay; where it keeps locks on each host, a
start on another host takes a draft that is being written for one of these, and its writer ends with an error.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fedmoe_ds.errors import UserError
from fedmoe_ds.storage.file_modes import doubt, keep_from_writers, keep_private
from fedmoe_ds.storage.files import remove, sync
from fedmoe_ds.storage.in_use import hold
from fedmoe_ds.storage.strict_json import tree_sha256

KINDS = {"data": True, "native": True, "scratch": True, "foundations": False, "shared": False, "sums": False, "wheels": False}
"""The folders below a root, and whether only this user may read what is there: clients' data, and code, which he alone runs.
`scratch` has no entries: files without a name, which go with their process."""

_DEFAULT = "~/.cache/fedmoe_ds"
_DRAFT, REPLACED, _LOCK = ".draft-", ".replaced-", "lock"
_SEAL = "seal"
_EARLIER = (".staging-", ".partial-", "tmp")
"""Drafts of earlier versions hold no lock; after a day nobody works on them any more."""
_EARLIER_S = 86400.0
_passed: dict[str, None] = {}


def root(configured: str | None) -> Path:
    """The folder that is asked for: the configured one, or $FEDMOE_CACHE, or ~/.cache/fedmoe_ds.

    Raises:
        UserError: it is below the home of a user who has none.
    """
    asked = configured or os.environ.get("FEDMOE_CACHE") or _DEFAULT
    try:
        return Path(asked).expanduser()
    except RuntimeError:
        raise UserError(f"foundation.cache: {asked}: this user has no home folder; set another one") from None


def place(root: Path, kind: str) -> Path:
    """The folder for entries of a kind: in `root`, or, where somebody else may have written there, in one of this user's own.

    That is `user-<id>` in the root, so that ranks of several hosts find it as they would find the root, or the default folder
    at home. Leftovers of killed writers are removed.

    Raises:
        UserError: neither can be had.
    """
    bases, reasons = [root, root / f"user-{os.geteuid()}"], list[str]()
    with suppress(RuntimeError):
        bases.append(Path(_DEFAULT).expanduser())
    for base in bases:
        folder = base / kind
        reason = doubt(base) or doubt(folder) or _closed(base) or _closed(folder)
        if reason is None and (base is root or _can_be_made(folder)):
            if reasons:
                pass_over(f"{reasons[0]}: not used; entries are kept in {base}")
            sweep(folder)
            return folder
        reasons += [reason] if reason is not None else []
    raise UserError(
        f"foundation.cache: {reasons[0]}: not used, and a folder of this user's own can be made neither there nor at home; "
        "choose another folder"
    )


def usable(entry: Path, intact: Callable[[], bool]) -> bool:
    """Whether an entry is there that nobody else can have written, and that is intact; any other one is told.

    Raises:
        OSError: it cannot be read.
    """
    # Held before it is looked at: cleaning (`cleaning`) leaves what is in use.
    if not entry.is_dir() or not hold(entry):
        return False
    # Owner and mode before checksums: who can write an entry can write its checksums, too.
    reason = next(filter(None, map(doubt, (entry, *entry.rglob("*")))), None)
    if reason is None and not intact():
        reason = f"{entry} is damaged"
    if reason is not None:
        pass_over(f"{reason}: made anew")
    return reason is None


@contextmanager
def draft(entry: Path, good: Callable[[], bool], flush: bool = True) -> Iterator[Path]:
    """A fresh folder that becomes `entry` in one step when the block ends, and goes when it fails.

    What was there before is replaced; where another writer was faster, its entry stays.

    Args:
        good: whether what is at `entry` now may stay.
        flush: bring every byte to the disk first. Needless where readers check all of it anyway.
    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    folder = entry.parent
    private = KINDS.get(folder.name, True)
    _make(folder, private)
    sweep(folder)
    with _locked_draft(folder) as own:
        # A folder below the draft: the lock's file must not become part of the entry.
        content = own / "content"
        content.mkdir(0o700)
        yield content
        for path in (*content.rglob("*"), content):
            (keep_private if private else keep_from_writers)(path)
            if flush:
                sync(path)
        hold(content)  # the lock goes with the folder: the entry is in use from its first moment
        _publish(content, entry, good)


@contextmanager
def storing(entry: Path, *others: type[Exception]) -> Iterator[None]:
    """The one line for a cache that cannot be read or written; `others` are what a library raises for that, too."""
    kinds: tuple[type[Exception], ...] = (OSError, *others)
    try:
        yield
    except kinds as error:
        raise UserError(
            f"foundation.cache: {entry.parent}: cannot be written: {error}; free space or choose another folder"
        ) from error


def sealed(tree: dict[str, Any]) -> dict[str, Any]:
    """What a JSON file of an entry should hold, with a checksum of itself."""
    return {**tree, _SEAL: tree_sha256(json.loads(json.dumps(tree)))}


def seal_holds(tree: dict[str, Any]) -> bool:
    """Whether it is what was written; earlier versions sealed nothing."""
    return _SEAL not in tree or tree[_SEAL] == tree_sha256({key: value for key, value in tree.items() if key != _SEAL})


def has_seal(tree: dict[str, Any]) -> bool:
    """Whether it has a seal, and that holds: it was written here."""
    return _SEAL in tree and seal_holds(tree)


def pass_over(reason: str) -> None:
    """Remember to tell the user what was not used; the same reason counts once."""
    _passed[reason] = None


def passed_over() -> list[str]:
    """What was not used since the last call, for `line`."""
    reasons = list(_passed)
    _passed.clear()
    return reasons


def line(reasons: Iterable[list[str]]) -> str | None:
    """One line of what processes have passed over; the same reason counts once."""
    found = list(dict.fromkeys(reason for theirs in reasons for reason in theirs))
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return f"foundation.cache: {found[0]}{more}" if found else None


def _closed(folder: Path) -> str | None:
    """Why this user cannot look into a folder that is there."""
    return None if os.access(folder, os.R_OK | os.X_OK) or not folder.is_dir() else f"{folder} cannot be read by this user"


def _make(folder: Path, private: bool) -> None:
    folder.parent.mkdir(0o755, parents=True, exist_ok=True)  # as the umask has it, but for nobody else to write
    folder.mkdir(0o700 if private else 0o755, exist_ok=True)


def _can_be_made(folder: Path) -> bool:
    """Make a folder of this user's own. Where a file system maps users to others it belongs to somebody else all the same."""
    try:
        folder.parent.mkdir(0o700, parents=True, exist_ok=True)
        folder.mkdir(0o700, exist_ok=True)
    except OSError:
        return False
    return doubt(folder.parent) is None and doubt(folder) is None and os.access(folder, os.W_OK | os.X_OK)


@contextmanager
def _locked_draft(folder: Path) -> Iterator[Path]:
    """A new folder with a lock that lives as long as this process."""
    while True:
        own = folder / f"{_DRAFT}{uuid.uuid4().hex}"
        own.mkdir(0o700)
        try:
            handle = os.open(own / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except FileNotFoundError:  # somebody has found it before it had a lock, and removed it
            continue
        except OSError:
            own.rmdir()
            raise
        # Between open and lock another process may have taken this draft for a dead writer's, and removed it.
        if _take(handle) is not False and (own / _LOCK).exists():
            break
        os.close(handle)
    try:
        yield own
    finally:
        # While the lock is still held: nobody else sweeps the same folder.
        shutil.rmtree(own, ignore_errors=True)
        os.close(handle)


def _take(handle: int) -> bool | None:
    """Whether the lock could be had; None where the file system has none."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _publish(content: Path, entry: Path, good: Callable[[], bool]) -> None:
    """Move a finished folder to its place. Others may do the same: what they have put there stays if it is good."""
    # The usual case needs no lock: rename() takes the place of nothing, or of an empty folder, in one step.
    if _moved(content, entry):
        return
    with _alone(entry.parent):
        for _ in range(8):  # more than once only where there are no locks
            if good() or _moved(content, entry):
                return
            old = entry.with_name(f"{REPLACED}{uuid.uuid4().hex}")
            with suppress(FileNotFoundError):
                entry.rename(old)  # within its folder, whose owner may do that even with another user's entry
                remove(old)
    raise OSError(errno.EBUSY, "other writers replace it again and again", str(entry))


def _moved(content: Path, entry: Path) -> bool:
    try:
        content.rename(entry)
    except OSError as error:
        # A folder with content (two codes, by file system), or a file, is in its place.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        return False
    return True


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time, where the file system can lock a folder (NFS cannot)."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def sweep(folder: Path) -> None:
    """Remove what killed writers have left behind in the folder of a kind."""
    try:
        found = [path for path in folder.iterdir() if path.name.startswith((_DRAFT, REPLACED, *_EARLIER))]
    except OSError:
        return
    for path in found:
        with suppress(OSError):
            if path.name.startswith(_DRAFT):
                _remove_unlocked(path)
            elif path.name.startswith(REPLACED) or time.time() - path.stat().st_mtime > _EARLIER_S:
                remove(path)


def _remove_unlocked(own: Path) -> None:
    try:
        handle = os.open(own / _LOCK, os.O_RDWR)
    except FileNotFoundError:
        own.rmdir()  # its writer has ended, or makes another one
        return
    try:
        # Only with the lock in hand: where a file system has none, a draft may still be written.
        if _take(handle):
            shutil.rmtree(own, ignore_errors=True)
    finally:
        os.close(handle)
