"""Absences: clients that a round goes on without, because an earlier start ran out of memory on them.

With experts sharded over ranks, a rank that runs out of memory cannot tell its peers, who wait for its rows: the job ends, and
the next start must not try again. One line of JSON per absence in `absent.jsonl`, beside the checkpoints.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

NAME = "absent.jsonl"


class Absences:
    """Those of one run folder; read once, at the start."""

    def __init__(self, folder: Path, known: list[list[int]] | None = None) -> None:
        self.path, self._known = folder / NAME, {(round_index, client) for round_index, client in known or []}

    def of(self, round_index: int) -> set[int]:
        """Indices of the clients that this round leaves out."""
        return {client for round_, client in self._known if round_ == round_index}

    def add(self, round_index: int, client: int) -> None:
        """Write one down for the next start; any rank may, at the moment of its failure."""
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            os.write(handle, (json.dumps([round_index, client]) + "\n").encode())
            os.fsync(handle)
        finally:
            os.close(handle)


def read(folder: Path) -> list[list[int]]:
    """(round, client index) of every absence; a line that a full disk cut short is left out."""
    path, found = folder / NAME, []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            round_index, client = json.loads(line)
        except ValueError:
            continue
        found.append([int(round_index), int(client)])
    return found
