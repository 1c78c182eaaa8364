"""Local files as a source: one of them, several whose rows follow each other, or a folder with one file per client."""

from __future__ import annotations

import glob
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedmoe_ds.data.groups import group_name
from fedmoe_ds.data.readers import COMPRESSIONS, READERS, TEXTUAL, DataFile
from fedmoe_ds.data.sources.source import with_rows
from fedmoe_ds.data.table import Column, Table
from fedmoe_ds.distributed.stop_points import file_sha256, stop_point
from fedmoe_ds.errors import UserError
from fedmoe_ds.storage.files import expanded
from fedmoe_ds.storage.strict_json import tree_sha256

CLIENT = "client"
"""The column that holds the names of a folder's clients."""
_FIRST_KINDS = frozenset({".jsonl", ".csv", ".parquet"})
_MAY_LACK = frozenset({".jsonl", ".ndjson", ".json"})
"""Kinds whose rows need not have every column: an absent key is a missing value."""
_UNPACK, _EXPORT = "unpack it", "save it as CSV or Parquet"
WAYS = {
    **dict.fromkeys((".zip", ".tar", ".tgz", ".xz", ".7z", ".lz4"), _UNPACK),
    **dict.fromkeys((".xlsx", ".xls", ".ods", ".sqlite", ".db", ".orc", ".avro", ".pkl", ".pickle", ".npz"), _EXPORT),
    **dict.fromkeys((".pdf", ".docx", ".doc", ".html", ".xml", ".md", ".yaml", ".py"), "save its text as .txt or .jsonl"),
}
"""What helps with the commonest kinds of files that have no reader."""
KINDS = (
    f"{', '.join(ending for ending in READERS if ending in TEXTUAL)}, each also packed ({', '.join(COMPRESSIONS)}), "
    f"{' or '.join(ending for ending in READERS if ending not in TEXTUAL)}"
)


@dataclass(frozen=True)
class FileSource:
    """A single local file."""

    file: DataFile
    group_column: str | None = None

    @property
    def files(self) -> Sequence[DataFile]:
        """All files that are read."""
        return [self.file]

    def digest(self) -> str:
        try:
            content = file_sha256(self.file.path)
        except OSError as error:
            raise self._unreadable(error) from error
        # The same bytes are other rows in another kind of file; the first kinds keep theirs, and so their caches.
        first = self.file.ending in _FIRST_KINDS and not self.file.packed
        return content if first else tree_sha256([self.file.ending, self.file.packed, content])

    def table(self, wanted: Collection[str]) -> Table:
        try:
            table = READERS[self.file.ending](self.file, wanted)
        except OSError as error:
            raise self._unreadable(error) from error
        return with_rows(table, self.file.key, str(self.file.path))

    def _unreadable(self, error: OSError) -> UserError:
        return self.file.error(f"cannot be read: {error.strerror or error}; mend its permissions")


@dataclass(frozen=True)
class FilesSource:
    """Several local files, one after the other; `clients` names the client of each, where the files are clients'."""

    files: Sequence[DataFile]
    clients: Sequence[str] | None = None

    @property
    def group_column(self) -> str | None:
        return None if self.clients is None else CLIENT

    def digest(self) -> str:
        contents = [[file.ending, FileSource(file).digest()] for file in self.files]
        # Names of files count where they are clients; elsewhere only the order of the rows does.
        return tree_sha256([contents, list(self.clients or ())])

    def table(self, wanted: Collection[str]) -> Table:
        tables: dict[str, Table] = {}
        for file in self.files:
            stop_point()
            tables[str(file.path)] = FileSource(file).table(wanted)
        self._check_columns(tables)
        table = Table.concat(tables)
        if self.clients is None:
            return table
        # One list for each file: the chunks of the other columns end where files do, or later.
        names = Column.joined(Column([[name] * len(part)]) for name, part in zip(self.clients, tables.values(), strict=True))
        return replace(table, names=[*table.names, CLIENT], columns=table.columns | {CLIENT: names})

    def _check_columns(self, tables: dict[str, Table]) -> None:
        first = self.files[0]
        wanted = dict.fromkeys(name for table in tables.values() for name in table.columns)
        for file, table in zip(self.files, tables.values(), strict=True):
            if self.clients is not None and CLIENT in table.names:
                raise file.error(
                    f"has a column '{CLIENT}', and in a folder the file's name is the client; to read that column, give "
                    f"the files as a glob ({file.path.parent}/*{file.path.suffix}) with data.partition.column={CLIENT}"
                )
            for name in wanted:
                if name not in table.columns and file.ending not in _MAY_LACK:
                    there = next(str(other) for other, found in tables.items() if name in found.columns)
                    raise file.error(
                        f"no column '{name}', which {there} has; present: {', '.join(table.names)}; give files with the same "
                        "columns"
                    )
                if name in table.columns and table.classes.get(name) != tables[str(first.path)].classes.get(name):
                    raise file.error(f"column '{name}' has other label names than in {first.path}; write its labels as words")


def local_source(given: str, file: DataFile) -> FileSource | FilesSource | None:
    """Return the source that a path or a glob names, or None where it is neither: nothing is there, and no ending is known.

    Args:
        given: what the configuration says.
        file: the same, with its key, its separator and its encoding.
    Raises:
        UserError: for a missing file, a kind of file that has no reader, and a folder that is not one file per client.
    """
    path = file.path
    if exists(path, file):
        if os.path.isdir(path):
            return _folder(file)
        return FileSource(_readable(file))
    if glob.has_magic(given):
        found = sorted(glob.glob(str(path), recursive=True))
        if not found:
            raise UserError(f"{file.key}: {given}: no file matches; mend the pattern")
        return _several(found, file)
    if _has_reader(file):
        raise UserError(f"{file.key}: {given}: no such file; give an existing path")
    return None


def listed_source(given: Sequence[str], file: DataFile) -> FilesSource:
    """Return the files of a list of paths and globs, in the list's order. Raises UserError as `local_source` does."""
    found: list[str] = []
    for item in given:
        path = expanded(item, file.key)
        one = None if os.path.isdir(path) else local_source(item, replace(file, path=path))
        if one is None:
            raise UserError(f"{file.key}: {item}: neither a file nor a glob, which is what a list holds; {use()}")
        found += [str(part.path) for part in one.files]
    return _several(found, file)


def use() -> str:
    """What may be given, in words."""
    return f"use files that end in {KINDS}"


def exists(path: Path, file: DataFile) -> bool:
    """Whether anything is at a path. Raises UserError where that cannot be known."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:  # a folder that may not be entered, a name that is too long or no name
        raise UserError(
            f"{file.key}: {path}: cannot be read: {getattr(error, 'strerror', None) or error}; give another path"
        ) from None
    return True


def _several(paths: Sequence[str], file: DataFile) -> FilesSource:
    files, seen = [_readable(replace(file, path=Path(path))) for path in paths], set()
    for one in files:
        # A row that is there twice could be trained on and held out.
        if (place := one.path.resolve()) in seen:
            raise one.error("named twice; its rows would be there twice: take it out once")
        seen.add(place)
    return FilesSource(files)


def _folder(file: DataFile) -> FilesSource:
    """One file per client, or one sub-folder of files per client, in the order of their names."""
    way = f"; in a folder every file is a client's: take it out, or give a glob such as {file.path}/*.jsonl"
    files: list[DataFile] = []
    clients: list[str] = []
    owners: dict[str, Path] = {}
    for entry in _entries(file):
        folder = os.path.isdir(entry.path) and not entry.path.name.startswith(".")
        inside, client = (_entries(entry), entry.path.name) if folder else ([entry], entry.name)
        files += [_readable(one, way) for one in inside]
        clients += [client] * len(inside)
        if not inside:
            raise entry.error("an empty folder, where a client's files should be; remove it")
        # Names are compared as the names of groups are: ann.csv and ann.jsonl would be one client without anybody saying so.
        if (other := owners.setdefault(group_name(client) or client, entry.path)) != entry.path:
            raise entry.error(f"client '{client}', as {other} is; rename one, or put its files into a folder of that name")
    if not files:
        raise file.error("an empty folder; give one with a file for each client")
    return FilesSource(files, clients)


def _entries(file: DataFile) -> list[DataFile]:
    """What a folder holds, by name."""
    try:
        # Sorted: a file system gives its entries in any order.
        return [replace(file, path=path) for path in sorted(file.path.iterdir())]
    except OSError as error:
        raise file.error(f"cannot be read: {error.strerror or error}; mend its permissions") from error


def _readable(file: DataFile, way: str = "") -> DataFile:
    """Return the file. Raises UserError where no reader takes it."""
    if file.path.name.startswith("."):
        raise file.error("hidden" + (way or "; rename it"))
    # os.path and not pathlib: what may not be looked at is told where it is opened.
    if not os.path.isfile(file.path):
        raise file.error("no regular file" + way)
    if not _has_reader(file):
        ending = "".join(file.path.suffixes[-2:]) if file.packed else file.path.suffix
        helps = f"; {WAYS[file.ending]}" if file.ending in WAYS else ""
        raise file.error(f"unknown kind of file '{ending}'{way or helps + '; ' + use()}")
    return file


def _has_reader(file: DataFile) -> bool:
    return file.ending in READERS and (not file.packed or file.ending in TEXTUAL)
