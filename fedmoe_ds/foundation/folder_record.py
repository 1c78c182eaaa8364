"""Folder record: the JSON file beside a model in the cache that says how it was made, and by which its files are checked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedmoe_ds.distributed.stop_points import file_sha256
from fedmoe_ds.storage import cache
from fedmoe_ds.storage.strict_json import read_json


def write(file: Path, facts: dict[str, Any]) -> None:
    """Write the record of a folder that is complete otherwise: the facts, and the SHA-256 of every file."""
    # The record is written last, so it is not among the files whose sums it holds.
    sums = {path.name: file_sha256(path) for path in sorted(file.parent.iterdir())}
    file.write_text(json.dumps(cache.sealed({**facts, "sha256": sums}), indent=1))


def usable(file: Path, digest: Callable[[Path], str] = file_sha256) -> bool:
    """Whether the folder of a record is there, from this user, and as it was written; see `cache.usable`.

    `digest` gives the SHA-256 of a file: read again, or remembered where a model is large (`file_sums.py`).
    """
    return cache.usable(file.parent, lambda: _intact(file, digest))


def _intact(file: Path, digest: Callable[[Path], str]) -> bool:
    """Whether the files are as they were saved; what earlier versions have saved does not tell."""
    try:
        record = read_json(file)
        sums: dict[str, str] = record.get("sha256", {})
        return cache.seal_holds(record) and all(digest(file.parent / name) == promised for name, promised in sums.items())
    except (OSError, ValueError, TypeError, AttributeError):
        return False
