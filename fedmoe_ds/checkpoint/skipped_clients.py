"""Skipped clients: those that a round goes on without, because a start ran out of memory on them; before that, smaller passes.

With experts sharded over ranks, a rank that runs out of memory cannot tell its peers, who wait for its rows: the job ends, and
the next start must not try again. And whoever resumes a round must leave out the same clients, and cut the steps of the others
as they were cut, even if it has more memory. One line of JSON per finding in `absent.jsonl`, beside the checkpoints:

    [settings, round, client]             the client is left out of this round
    [settings, round, client, sequences]  in this round, a pass has at most so many sequences of this client
    [settings, round, null, sequences]    from here on, clients share a pass only up to so many sequences of a rank
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedmoe_ds.clients.pass_limits import PassLimits
from fedmoe_ds.errors import UserError
from fedmoe_ds.storage.files import open_plain
from fedmoe_ds.storage.strict_json import parse_json, tree_sha256

NAME = "absent.jsonl"
Finding = tuple[int, int | None, int | None]
"""(round, client, sequences)."""


class SkippedClients:
    """Those of one run.

    Args:
        folder: of the run.
        settings: what decides which clients there are and what a pass of theirs needs; findings under others do not count.
        lines: of the file, as rank 0 has read them.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], lines: list[str]) -> None:
        self.path = folder / NAME
        self.key = tree_sha256(settings)[:16]
        self._known = {found for line in lines if (found := _parse(line, self.key)) is not None}
        self._news = set[Finding]()

    def of(self, round_index: int) -> set[int]:
        """Indices of the clients that this round leaves out."""
        return {
            client
            for found, client, sequences in self._known
            if found == round_index and client is not None and sequences is None
        }

    def limits(self, round_index: int) -> PassLimits:
        """How the passes of a round are cut. What was found for single clients in a round holds for everybody from the next one
        on, and within the round for them alone: others had been trained in whole steps by then."""
        known = [(found, client, count) for found, client, count in self._known if count is not None]
        together = [count for _, client, count in known if client is None]
        each = [count for found, client, count in known if client is not None and found < round_index]
        own = sorted((-count, client) for found, client, count in known if client is not None and found == round_index)
        # Largest first: of several the smallest stays.
        return PassLimits(min(together, default=None), min(each, default=None), {client: -count for count, client in own})

    @property
    def news(self) -> list[Finding]:
        """What this rank has written down since the ranks last told each other."""
        return sorted(self._news, key=str)

    def learn(self, findings: Iterable[Iterable[Any]]) -> None:
        """Take over what a rank has written down, and told all of them."""
        told = {(found, client, sequences) for found, client, sequences in findings}
        self._known |= told
        self._news -= told

    def add(self, round_index: int, client: int) -> None:
        """Write an absence down; any rank may, at the moment of its failure. Raises OSError."""
        self._write([(round_index, client, None)])

    def limit(self, round_index: int, clients: Iterable[int], sequences: int, together: bool = False) -> None:
        """Write down how many sequences of each of these clients a pass may have; `together`: and how many in all."""
        assert sequences >= 1, "the file's reader takes less for 1: the next start would try the same again"
        self._write([(round_index, client, sequences) for client in clients] + [(round_index, None, sequences)] * together)

    def _write(self, findings: list[Finding]) -> None:
        self._known |= set(findings)
        self._news |= set(findings)
        entries = [[found, client] if count is None else [found, client, count] for found, client, count in findings]
        text = "".join(json.dumps([self.key, *entry]) + "\n" for entry in entries)
        # Appended in one write: several ranks may run out of memory at the same moment.
        handle = open_plain(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            # The newline before it ends a line that a full disk has cut short.
            os.write(handle, ("\n" + text).encode())
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


def findings_of(folders: Iterable[Path]) -> frozenset[tuple[Path, str]]:
    """All that runs have written down. A start that ends with more of it has brought its job further, though it was lost.
    Raises UserError as `read_lines`."""
    return frozenset((folder, line) for folder in folders for line in read_lines(folder) if line)


def _parse(line: str, key: str) -> Finding | None:
    """A line's finding under these settings; None: it is of others, or torn."""
    try:
        written, round_index, client, *rest = parse_json(line)
        sequences = int(rest[0]) if rest else None
        if str(written) != key or len(rest) > 1 or (client is None and sequences is None):
            return None
        # No pass is empty, whatever a damaged line says.
        return int(round_index), None if client is None else int(client), None if sequences is None else max(sequences, 1)
    except (ValueError, TypeError, OverflowError):
        return None
