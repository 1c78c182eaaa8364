"""Report files: what a study writes at its end, and the second place for its text and picture."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from fedmoe_ds.errors import UserError
from fedmoe_ds.storage.files import check_replaceable, write_whole


def check_copy(path: Path | None) -> None:
    """Find out before the runs whether the report can be stored where --report says. Raises UserError."""
    if path is None:
        return
    if path.suffix != ".md" or path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"--report: {path}: cannot be written; give a .md file in an existing folder")
    for file in (path, path.with_suffix(".svg")):
        try:
            check_replaceable(file, links=False)
        except OSError as error:
            raise UserError(f"--report: {file}: {error.strerror}; give another file") from None


def write_files(content: Mapping[Path, str]) -> None:
    """Write every file whole. Raises UserError naming the one that cannot be written."""
    for path, body in content.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, body)
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror or error}; give another folder") from None
