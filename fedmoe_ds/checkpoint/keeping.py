"""Keeping: what stays of older checkpoints: files that a newer one shares with them, and the newest and best folders.

A shared file is a link in both folders, so the file system itself counts who needs it: removing a folder takes no byte from
another, and a folder is whole by itself wherever it is copied to. The price: a damaged file is damaged in all that share it.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from fedmoe_ds.checkpoint.reader import candidates, folder_name, read_snapshot
from fedmoe_ds.errors import UserError
from fedmoe_ds.storage.file_modes import keep_private
from fedmoe_ds.storage.files import remove, sync

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EXDEV, errno.EMLINK)
"""How file systems say that they have no links, or no more to this file."""


def take_over(
    source: Path, target: Path, names: Iterable[str], known: Mapping[str, str] | None = None
) -> tuple[dict[str, str], int]:
    """Give private files of one checkpoint a place in another one as well.

    Returns their sha256, as the manifest of `source` has them, and how many bytes had to be copied. Raises OSError.

    Args:
        known: their sha256, where the caller need not read that manifest for it.
    """
    known, sums, copied = read_snapshot(source).files if known is None else known, dict[str, str](), 0
    for name in names:
        try:
            os.link(source / name, target / name, follow_symlinks=False)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            shutil.copyfile(source / name, target / name, follow_symlinks=False)
            keep_private(target / name)
            sync(target / name)
            copied += (target / name).stat().st_size
        sums[name] = known[name]
    return sums, copied


def none_intact(root: Path, notes: Sequence[str]) -> UserError:
    """Where a run has trained and all its checkpoints are damaged, perhaps by one file that they share: to begin again would
    drop the record of what may still be saved, so its owner decides.

    Args:
        notes: what `newest_intact` says of them.
    """
    damage, older = notes[0].rpartition(";")[0], f" and {len(notes) - 1} older" if notes[1:] else ""
    return UserError(
        f"--resume: {root}: no intact checkpoint is left: {damage}{older}; put its file back from a copy, remove this folder "
        "to train and record from the beginning, or set another name"
    )


def prune(root: Path, keep: int, written: Path, best: int | None) -> None:
    """Keep the newest `keep` complete rounds, and the best one; an interrupted round goes as soon as a later checkpoint exists.

    Whatever claims to be newer than the one just written was damaged, or this start would have continued from it.
    """
    found = candidates(root)
    older = found[found.index(written) :]
    complete = [path for path in older if not path.name.endswith("-partial")]
    kept = {written, *complete[:keep]}
    if best is not None:
        kept.add(root / folder_name(best, False))
    for path in found:
        if path not in kept:
            remove(path)
