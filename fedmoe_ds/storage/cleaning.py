"""Cleaning: what lies in the cache, and how it is removed by hand.

Listed and removed is what this user's runs would use: entries `<root>/<kind>/<key>`, and those below `<root>/user-<id>`. A
symbolic link is neither followed nor removed, nor is anything that somebody else may have written, or that a process uses now
(`in_use`). An entry goes in one step: it is renamed before its files are removed, so no start finds half of it.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedmoe_ds.errors import UserError
from fedmoe_ds.storage import cache
from fedmoe_ds.storage.file_modes import doubt
from fedmoe_ds.storage.files import remove
from fedmoe_ds.storage.in_use import alone_with
from fedmoe_ds.storage.strict_json import read_json

DAY_S = 86400.0
MADE_FROM = "made_from"
"""In the `header.json` of an entry: in a few words, what it was made from."""


@dataclass(frozen=True)
class Entry:
    """One entry: its size in bytes, when it was last used (seconds since 1970), and what it was made from, "" if unknown."""

    kind: str
    path: Path
    size: int
    used: float
    made_from: str


def entries(root: Path, kind: str | None = None) -> list[Entry]:
    """All entries below a root, or those of one kind, the largest first. Raises UserError where the root cannot be read."""
    found = []
    for name, folder in _folders(root, kind):
        for path in _plain_folders(folder):
            # Another cleaning, or a start that replaces a damaged entry, may be faster.
            with contextlib.suppress(FileNotFoundError):
                found.append(_entry(name, path))
    return sorted(found, key=lambda entry: (-entry.size, entry.path))


def listing(root: Path, kind: str | None = None) -> str:
    """What `list` prints: a line per entry, and the sum."""
    found = entries(root, kind)
    if not found:
        return f"{root}: nothing is kept"
    lines = [f"{entry.kind:<12} {_size(entry.size):>10} {_age(entry):>10}  {entry.path.name}{_from(entry)}" for entry in found]
    total = sum(entry.size for entry in found)
    return "\n".join(
        [f"{'kind':<12} {'size':>10} {'last used':>10}  entry, and what it was made from", *lines,
         f"{len(found)} entries, {_size(total)} in {root}"]
    )  # fmt: skip


def clean(root: Path, older_than_days: float = 0.0, kind: str | None = None) -> Iterator[str]:
    """Remove the entries that were not used for so long; a line for each that went or had to stay, and the sum.

    What killed writers have left goes, too, whatever its age.
    """
    removed, size = 0, 0
    for _, folder in _folders(root, kind):
        cache.sweep(folder)
    for entry in entries(root, kind):
        if time.time() - entry.used < older_than_days * DAY_S:
            continue
        reason = _removed(entry)
        if reason is not None:
            yield f"kept: {entry.kind} {entry.path.name}: {reason}"
            continue
        removed, size = removed + 1, size + entry.size
        yield f"removed: {entry.kind} {entry.path.name}, {_size(entry.size)}, last used {_age(entry)} ago{_from(entry)}"
    yield f"{removed} entries removed, {_size(size)} in {root}"


def _removed(entry: Entry) -> str | None:
    """Remove an entry; why it stays."""
    try:
        with alone_with(entry.path) as reason:
            if reason is not None:
                return reason
            gone = entry.path.with_name(f"{cache.REPLACED}{uuid.uuid4().hex}")
            entry.path.rename(gone)
        # Outside: whoever waits for this entry finds at once that it has gone. What is left after a crash is swept up later.
        remove(gone)
    except OSError as error:
        return error.strerror or str(error)
    return "some of its files could not be removed" if gone.exists() else None


def _folders(root: Path, kind: str | None) -> Iterator[tuple[str, Path]]:
    """The folders of kinds in which this user's runs keep entries, with their kinds."""
    if root.exists() and not os.access(root, os.R_OK | os.X_OK):
        raise UserError(f"--cache: {root}: cannot be read by this user; name another folder")
    for base in (root, root / f"user-{os.geteuid()}"):
        for name in cache.KINDS if kind is None else (kind,):
            folder = base / name
            linked = folder.is_symlink() or (base is not root and base.is_symlink())
            # In doubt a run passes it over, and so does cleaning: whoever can write there could have put anything.
            if not linked and folder.is_dir() and doubt(base) is None and doubt(folder) is None and os.access(folder, os.R_OK):
                yield name, folder


def _plain_folders(folder: Path) -> list[Path]:
    """Its entries: folders of this user's, no links, no drafts."""
    found = [path for path in folder.iterdir() if not path.name.startswith(".")]
    return [path for path in found if not path.is_symlink() and path.is_dir() and doubt(path) is None]


def _entry(kind: str, path: Path) -> Entry:
    # lstat: a link in an entry counts as itself.
    size = sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())
    return Entry(kind, path, size, path.stat().st_mtime, _made_from(path))


def _made_from(path: Path) -> str:
    """What the entry's own files say; entries of earlier versions, and compiled code, say nothing."""
    for name, key in (("header.json", MADE_FROM), ("pretrain.json", "preset"), ("source.json", MADE_FROM)):
        try:
            told = read_json(path / name)
        except (OSError, ValueError):
            continue
        if isinstance(told, dict) and isinstance(told.get(key), str):
            return str(told[key])
    return ""


def _from(entry: Entry) -> str:
    return f"  {entry.made_from}" if entry.made_from else ""


def _age(entry: Entry) -> str:
    seconds = max(time.time() - entry.used, 0.0)
    if seconds >= DAY_S:
        return f"{seconds / DAY_S:.1f} d"
    return f"{seconds / 3600:.1f} h"


def _size(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
