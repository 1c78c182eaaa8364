"""Where rows come from: the standard library, a local file, or a data set on the Hugging Face hub.

A source answers two questions: what is your content (a digest, so that prepared data can be found again without reading
the rows), and what are your rows (a `Table`, of the columns that are asked for).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fedmoe_ds.config.schema import DataConfig
from fedmoe_ds.data import stdlib, wheels
from fedmoe_ds.data.readers import READERS, in_one_line
from fedmoe_ds.data.real import real_source
from fedmoe_ds.data.table import Column, Table
from fedmoe_ds.distributed.stop_points import file_sha256, run_waiting, stop_point
from fedmoe_ds.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

# A hub id may hold dots, so only endings that are surely files count as files that do not exist.
OTHER_FILES = (".json", ".txt", ".tsv", ".arrow", ".gz", ".zip", ".bz2", ".zst", ".xlsx", ".py", ".md", ".ndjson")


class Source(Protocol):
    """Rows with a content digest."""

    @property
    def group_column(self) -> str | None:
        """The column that says which group a row belongs to, where the source itself knows."""
        ...

    def digest(self) -> str:
        """Return a sha256 that changes when a row changes."""
        ...

    def table(self, wanted: Collection[str]) -> Table:
        """Return the rows, with those of the wanted columns that there are."""
        ...


def open_source(config: DataConfig, cache: Path) -> Source:
    """Return the source that `data.source` names; nothing is read yet, but a missing file is found.

    `cache` is the root of the cache folder: files out of wheels are kept there.
    """
    if config.source == "stdlib":
        return StdlibSource()
    if (real := real_source(config, cache)) is not None:
        return real
    if config.source.startswith(wheels.PREFIX):
        config = config.model_copy(update={"source": str(wheels.local_file(config.source, cache))})
    path = Path(config.source).expanduser()
    if path.suffix in READERS:
        if not _is_there(path, Path.is_file):
            raise UserError(f"data.source: {config.source}: no such file; give an existing path")
        return FileSource(path)
    names_a_path = config.source.startswith(("/", "./", "../", "~")) or config.source.count("/") > 1
    if _is_there(path) or names_a_path or path.suffix in OTHER_FILES:
        raise UserError(
            f"data.source: {config.source}: unknown kind of file '{path.suffix}'; "
            f"use 'stdlib', a hub data set id, or a file that ends in {', '.join(READERS)}"
        )
    return HubSource(config.source, config.split)


def _is_there(path: Path, kind: Callable[[Path], bool] = Path.exists) -> bool:
    try:
        return kind(path)
    except OSError as error:  # a folder that may not be entered, a name that is too long
        raise UserError(f"data.source: {path}: cannot be read: {error.strerror or error}; give another path") from None


@dataclass(frozen=True)
class StdlibSource:
    """The federated half of the standard library; columns group, name, text."""

    group_column: str | None = "group"

    @cached_property
    def _documents(self) -> list[stdlib.Document]:
        # Read once per process: the digest and the table need the same documents.
        return stdlib.split(stdlib.documents())[1]

    def digest(self) -> str:
        content = hashlib.sha256()
        for document in self._documents:
            for part in (document.group, document.name, document.text):
                # Every part is hashed on its own: moving a character from a name to a text must change the digest.
                content.update(hashlib.sha256(part.encode()).digest())
        return content.hexdigest()

    def table(self, wanted: Collection[str]) -> Table:
        names = ["group", "name", "text"]
        columns = {name: Column([[getattr(d, name) for d in self._documents]]) for name in names}
        return Table(names, columns, len(self._documents))


@dataclass(frozen=True)
class FileSource:
    """A local JSONL, CSV or Parquet file."""

    path: Path
    group_column: str | None = None

    def digest(self) -> str:
        try:
            return file_sha256(self.path)
        except OSError as error:
            raise self._unreadable(error) from error

    def table(self, wanted: Collection[str]) -> Table:
        try:
            table = READERS[self.path.suffix](self.path, wanted)
        except OSError as error:
            raise self._unreadable(error) from error
        return _with_rows(table, str(self.path))

    def _unreadable(self, error: OSError) -> UserError:
        return UserError(f"data.source: {self.path}: cannot be read: {error.strerror or error}; mend its permissions")


@dataclass(frozen=True)
class HubSource:
    """One split of a data set on the hub, or in the hub's local cache."""

    name: str
    split: str
    group_column: str | None = None

    @cached_property
    def _rows(self) -> Dataset:
        import datasets

        with quiet_datasets():
            try:
                return run_waiting(lambda: datasets.load_dataset(self.name, split=self.split))
            except Exception as error:  # network, permission, spelling, script: one line serves the user for all of them
                raise UserError(
                    f"data.source: {self.name} (split {self.split}): cannot be loaded from the hub: "
                    f"{in_one_line(root_cause(error))}; "
                    "check the id, the split and the network, or give a local file"
                ) from error

    def digest(self) -> str:
        # The features belong to it: the words of a ClassLabel are labels that no row shows.
        content = hashlib.sha256(repr(self._rows.features).encode())
        for batch in self._rows.with_format("arrow").iter(batch_size=1000):
            stop_point()
            # Values and not Arrow's buffers: their padding and offsets differ between equal tables.
            content.update(json.dumps(batch.to_pydict(), default=repr, sort_keys=True).encode())
        return content.hexdigest()

    def table(self, wanted: Collection[str]) -> Table:
        try:
            table = Table.of_dataset(self._rows, wanted)
        except ValueError as error:
            raise UserError(f"data.source: {self.name}: {in_one_line(error)}; use another data set or a local file") from error
        return _with_rows(table, self.name)


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Hide what `datasets` prints inside, progress and log lines; afterwards both are as they were."""
    import datasets

    shown, level = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL + 1)  # its errors are raised too, and then told in one line
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        # Only what was on is switched on again: the user may have disabled the bars.
        if shown:
            datasets.enable_progress_bars()


def root_cause(error: BaseException) -> BaseException:
    """Return what went wrong at first: `datasets` wraps it in what it was doing."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _with_rows(table: Table, name: str) -> Table:
    if len(table) == 0:
        raise UserError(f"data.source: {name}: no rows; give data with at least two samples")
    return table
