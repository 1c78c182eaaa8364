"""Personal files: which files of a checkpoint hold whose personal state, and what a further checkpoint has to write.

A checkpoint writes the clients that were trained since the one before, and takes over the files of that one which still hold
somebody's newest row, as links to the same bytes: a folder is whole by itself, and removing one takes nothing from another.

Files are levels of a log-structured merge (O'Neil et al. 1996): what is written takes the rows of every newest level that is no
more than twice as large with it. Levels then shrink by halves: there are log2(clients) of them, with twice as many rows as
clients at most, and a row is written again O(log(clients / participants)) times.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fedmoe_ds.checkpoint.client_homes import Homes
from fedmoe_ds.checkpoint.reader import PERSONAL

BEGINNING = -1
"""In the place of a client: what everybody begins with."""
_NAME = re.compile(PERSONAL + r"(\d{5,})-(\d{3,})-(\d{5,})-of-(\d{5,})-(\d{5,})-of-(\d{5,})\.safetensors")


@dataclass(frozen=True, order=True)
class FileName:
    """What the name of a file says: its level (0: what everybody begins with), a piece of it, and the rank that wrote it."""

    level: int
    piece: int
    cluster: int
    clusters: int
    shard: int
    shards: int

    def __str__(self) -> str:
        where = f"{self.cluster:05d}-of-{self.clusters:05d}-{self.shard:05d}-of-{self.shards:05d}"
        return f"{PERSONAL}{self.level:05d}-{self.piece:03d}-{where}.safetensors"

    @classmethod
    def of(cls, name: str) -> FileName | None:
        """None for files of earlier versions, which hold all clients."""
        found = _NAME.fullmatch(name)
        return None if found is None else cls(*map(int, found.groups()))

    def is_of_layout(self, homes: Homes) -> bool:
        return (self.clusters, self.shards) == (homes.clusters, homes.shards)

    def is_of_rank(self, homes: Homes) -> bool:
        return self.is_of_layout(homes) and (self.cluster, self.shard) == (homes.cluster, homes.shard)


@dataclass
class _File:
    """A file of a kept checkpoint: `rows` on disk, and the clients whose newest row it has."""

    name: FileName
    rows: int
    newest: set[int]


@dataclass(frozen=True)
class Plan:
    """What this rank does for the next checkpoint.

    Attributes:
        write: clients by file, in the order of its rows.
        keep: files of the last checkpoint that belong to the next one.
        source: folder of the last checkpoint.
    """

    write: dict[str, list[int]]
    keep: list[str]
    source: Path | None


class SavedFiles:
    """What this rank's files of the last checkpoint hold.

    Attributes:
        changed: clients at home here whose rows are newer than that.
        source: folder of the last checkpoint; None where there is none, or where another layout of ranks has written it.
    """

    def __init__(self, homes: Homes) -> None:
        self.homes, self.changed = homes, set[int]()
        self.source: Path | None = None
        self._files: list[_File] = []
        self._level = 0

    def take(self, folder: Path, files: Iterable[tuple[FileName, int, set[int]]], clients: Iterable[int]) -> None:
        """Go on from a checkpoint.

        Args:
            files: name, rows and clients whose newest row it has, of all files that were read of it.
            clients: all who have a row at home here.
        """
        found = [_File(*each) for each in files]
        mine = [file for file in found if file.name.is_of_rank(self.homes)]
        self.source, self._files, self.changed = None, [], set()
        if not found or not all(file.name.is_of_layout(self.homes) for file in found):
            # Rows of one client may lie in files of several ranks there: all of it is written once more, in this layout.
            self.changed = set(clients)
            return
        self.source = folder
        self._files = [file for file in mine if file.name.level > 0]
        self._level = max((file.name.level for file in mine), default=0)

    def plan(self, most: int) -> Plan:
        """What to write now, in files of `most` rows at most. It counts as written: a checkpoint that fails ends the run, and
        after any other one the caller says in `source` where it is."""
        writing, source = set(self.changed), self.source
        for file in self._files:
            file.newest -= writing
        self._files = [file for file in self._files if file.newest]
        while writing and self._files:
            last = max(file.name.level for file in self._files)
            if sum(file.rows for file in self._files if file.name.level == last) > 2 * len(writing):
                break
            writing = writing.union(*(file.newest for file in self._files if file.name.level == last))
            self._files = [file for file in self._files if file.name.level != last]
        keep = [str(file.name) for file in self._files]
        write: dict[str, list[int]] = {}
        if self.homes.cluster == 0:
            beginning = str(self._named(0, 0))
            if source is None:
                write[beginning] = [BEGINNING]
            else:
                keep.append(beginning)
        self._level += bool(writing)
        ordered = sorted(writing)
        for piece, start in enumerate(range(0, len(ordered), most)):
            clients = ordered[start : start + most]
            self._files.append(_File(self._named(self._level, piece), len(clients), set(clients)))
            write[str(self._files[-1].name)] = clients
        self.changed = set()
        return Plan(write, keep, source)

    def _named(self, level: int, piece: int) -> FileName:
        return FileName(level, piece, self.homes.cluster, self.homes.clusters, self.homes.shard, self.homes.shards)
