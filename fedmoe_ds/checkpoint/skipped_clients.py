"""Skipped clients: those that a round goes on without, because a start ran out of memory on them.

With experts sharded over ranks, a rank that runs out of memory cannot tell its peers, who wait for its rows: the job ends, and
the next start must not try again. And whoever resumes a round must leave out the same clients, even if it has more memory.
One line of JSON per absence in `absent.jsonl`, beside the checkpoints.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fedmoe_ds.errors import UserError
from fedmoe_ds.storage.files import open_plain
from fedmoe_ds.storage.strict_json import parse_json, tree_sha256

NAME = "absent.jsonl"


class SkippedClients:
    """Those of one run.

    Args:
        folder: of the run.
        settings: what decides which clients there are and what a pass of theirs needs; absences under others do not count.
        lines: of the file, as rank 0 has read them.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], lines: list[str]) -> None:
        self.path = folder / NAME
        self.key = tree_sha256(settings)[:16]
        self._known = {(found[1], found[2]) for line in lines if (found := _parse(line)) is not None and found[0] == self.key}

    def of(self, round_index: int) -> set[int]:
        """Indices of the clients that this round leaves out."""
        return {client for round_, client in self._known if round_ == round_index}

    def add(self, round_index: int, client: int) -> None:
        """Write one down; any rank may, at the moment of its failure. Raises OSError."""
        # Appended in one write: several ranks may run out of memory at the same moment.
        handle = open_plain(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            # The newline before it ends a line that a full disk has cut short.
            os.write(handle, ("\n" + json.dumps([self.key, round_index, client]) + "\n").encode())
            os.fsync(handle)
        finally:
            os.close(handle)


def read_lines(folder: Path) -> list[str]:
    """The file's lines, none where there is no file. Raises UserError where it cannot be read."""
    path = folder / NAME
    try:
        # A torn line must not hide the others: `_parse` passes over what it cannot read.
        return path.read_text(errors="replace").splitlines() if path.exists() else []
    except OSError as error:
        raise UserError(f"output: {path}: cannot be read: {error.strerror or error}; mend its permissions") from None


def _parse(line: str) -> tuple[str, int, int] | None:
    try:
        key, round_index, client = parse_json(line)
        return str(key), int(round_index), int(client)
    except (ValueError, TypeError, OverflowError):
        return None
