"""File sums: the SHA-256 of large files, remembered until one of them changes.

An entry of the cache (`storage/cache.py`) holds the sum of one file. Its key is a hash of all that changes with the file: path,
size, inode, the times of the last change of content and of anything (ctime, which no program can set), and the content of
some pages, for images whose files all carry the same times. Of a disk the machine's boot belongs to it, too: after a crash a
file may lack what was never written to the disk while its times are kept. Of a network file system its source does instead
(`storage/mounts.py`): what one host has read, a login node for instance, all hosts know. Not found: a disk that forgets bits by
itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fedmoe_ds.distributed.stop_points import file_sha256
from fedmoe_ds.storage import cache
from fedmoe_ds.storage.cleaning import MADE_FROM
from fedmoe_ds.storage.mounts import network_source
from fedmoe_ds.storage.strict_json import read_json, tree_sha256

KIND = "sums"
"""Below the cache folder."""
WORTH = 64 * 2**20
"""Bytes from which on a sum is remembered: what is smaller is read in the time that an entry takes."""
FORMAT = 2
_HEADER, _SUM = "header.json", "sum"
_PAGES, _PAGE = 64, 4096
_SETTLED_NS = 10 * 10**9
"""A file that has changed so recently may change again within the same tick of its file system's clock, unseen."""
_SETTLED_ON_NETWORK_NS = 60 * 10**9
"""Linux keeps what it wrote in memory for up to 35 s; if another host crashed with it, no boot of this one would tell."""
_BOOT = Path("/proc/sys/kernel/random/boot_id")


def stamp(file: Path) -> list[int]:
    """Size, inode, and the times of the last change of content and of anything: equal where nothing has touched the file.

    Raises OSError.
    """
    # Of the open file: opening makes a network file system ask its server, where looking alone may be answered from memory.
    with file.open("rb", buffering=0) as opened:
        return _stamp(opened.fileno())


def file_sum(file: Path, place: Path) -> str:
    """SHA-256 of a file, 64 hex digits, read again only where it is not remembered in `place`.

    Raises:
        OSError: the file cannot be read. A cache that cannot be used is told (`cache.pass_over`), and costs time alone.
    """
    if file.stat().st_size < WORTH:
        return file_sha256(file)
    before, began = _facts(file), time.time_ns()
    known = _remembered(place, before)
    if known is not None:
        return known
    found = file_sha256(file)
    # Only of a file that nobody was writing meanwhile, or just before.
    if began - max(before["stamp"][2:]) > _settled_ns(before) and _facts(file) == before:
        _remember(place, before, found)
    return found


def file_sums(files: Iterable[Path], place: Path, threads: int) -> dict[Path, str]:
    """The same of several files, so many at once. Raises OSError."""
    chosen = list(files)
    with ThreadPoolExecutor(threads, "file sums") as pool:
        return dict(zip(chosen, pool.map(lambda file: file_sum(file, place), chosen), strict=True))


def is_remembered(file: Path, place: Path) -> bool:
    """Whether `file_sum` would read nothing but some pages. Raises OSError."""
    if file.stat().st_size < WORTH:
        return False
    facts = _facts(file)
    return _remembered(place, facts) is not None


def remember_written(file: Path, found: str, place: Path) -> None:
    """Remember the sum of a file of the cache that this process has just written whole, and that nobody writes again.

    Not on a network file system: should this host crash now, the others would not know what never left its memory.

    Raises OSError: the file cannot be read.
    """
    if file.stat().st_size < WORTH:
        return
    facts = _facts(file)
    if not facts["network"]:
        _remember(place, facts, found)


def unsettled_s(files: Iterable[Path]) -> float:
    """Seconds until all of these files are old enough for their sums to be remembered. Raises OSError."""
    large = [facts for facts in (_facts(file) for file in files) if facts["stamp"][0] >= WORTH]
    now = time.time_ns()
    return max((_settled_ns(facts) + max(facts["stamp"][2:]) - now for facts in large), default=0) / 1e9


def network_view(files: Iterable[Path]) -> str | None:
    """What hosts that see the very same files of a network file system have in common; None where a file is on a disk.

    Raises OSError.
    """
    found = [_facts(file) for file in files]
    return tree_sha256(found) if found and all(facts["network"] for facts in found) else None


def _facts(file: Path) -> dict[str, Any]:
    """All that the sum is remembered by."""
    sample = hashlib.sha256()
    with file.open("rb", buffering=0) as opened:
        found = _stamp(opened.fileno())
        for page in range(_PAGES):
            sample.update(os.pread(opened.fileno(), _PAGE, page * max(found[0] - _PAGE, 0) // (_PAGES - 1)))
    network = network_source(file)
    boot = _BOOT.read_text().strip() if network is None and _BOOT.exists() else ""
    known = {"format": FORMAT, "path": str(file.resolve()), "stamp": found, "sample": sample.hexdigest()}
    return {**known, "boot": boot, "network": network}


def _settled_ns(facts: dict[str, Any]) -> int:
    return _SETTLED_ON_NETWORK_NS if facts["network"] else _SETTLED_NS


def _stamp(handle: int) -> list[int]:
    found = os.fstat(handle)
    return [found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]


def _entry(place: Path, facts: dict[str, Any]) -> Path:
    return place / tree_sha256(facts)[:32]


def _remembered(place: Path, facts: dict[str, Any]) -> str | None:
    entry = _entry(place, facts)
    try:
        return _sum_in(entry, facts) if _usable(entry, facts) else None
    except OSError as error:
        cache.pass_over(f"{entry}: cannot be read: {error.strerror or error}")
        return None


def _remember(place: Path, facts: dict[str, Any], found: str) -> None:
    entry = _entry(place, facts)
    content = cache.sealed({MADE_FROM: facts["path"], "facts": facts, _SUM: found})
    try:
        with cache.draft(entry, lambda: _usable(entry, facts)) as draft:
            (draft / _HEADER).write_text(json.dumps(content, indent=1), encoding="utf-8")
    except OSError as error:
        reason = error.strerror or error
        cache.pass_over(f"{place}: cannot be written: {reason}; the model is read whole at every start")


def _usable(entry: Path, facts: dict[str, Any]) -> bool:
    return cache.usable(entry, lambda: _sum_in(entry, facts) is not None)


def _sum_in(entry: Path, facts: dict[str, Any]) -> str | None:
    """What an entry says; None where it is damaged."""
    try:
        header = read_json(entry / _HEADER)
        whole = isinstance(header, dict) and cache.has_seal(header) and header["facts"] == facts
        return str(header[_SUM]) if whole else None
    except (OSError, ValueError, KeyError):
        return None
