"""Where rows come from: the standard library, a local file, or a data set on the Hugging Face hub.

A source answers two questions: what is your content (a digest, so that prepared data can be found again without reading
the rows), and what are your rows (a `datasets.Dataset`).
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fedmoe_ds.config.tree import DataConfig
from fedmoe_ds.data import stdlib
from fedmoe_ds.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

FILE_KINDS = (".jsonl", ".csv", ".parquet")
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

    def table(self, scratch: Path) -> Dataset:
        """Return the rows; `scratch` is an existing folder for temporary files."""
        ...


def open_source(config: DataConfig) -> Source:
    """Return the source that `data.source` names; nothing is read yet, but a missing file is found."""
    if config.source == "stdlib":
        return StdlibSource()
    path = Path(config.source).expanduser()
    if path.suffix in FILE_KINDS:
        if not path.is_file():
            raise UserError(f"data.source: {config.source}: no such file; give an existing path")
        return FileSource(path)
    names_a_path = config.source.startswith(("/", "./", "../", "~")) or config.source.count("/") > 1
    if path.exists() or names_a_path or path.suffix in OTHER_FILES:
        raise UserError(
            f"data.source: {config.source}: unknown kind of file '{path.suffix}'; "
            f"use 'stdlib', a hub data set id, or a file that ends in {', '.join(FILE_KINDS)}"
        )
    return HubSource(config.source, config.split)


@dataclass(frozen=True)
class StdlibSource:
    """The federated half of the standard library; columns group, name, text."""

    group_column: str | None = "group"

    @cached_property
    def _documents(self) -> list[stdlib.Document]:
        return stdlib.split(stdlib.documents())[1]

    def digest(self) -> str:
        content = hashlib.sha256()
        for document in self._documents:
            for part in (document.group, document.name, document.text):
                content.update(hashlib.sha256(part.encode()).digest())
        return content.hexdigest()

    def table(self, scratch: Path) -> Dataset:
        from datasets import Dataset

        columns = {field: [getattr(d, field) for d in self._documents] for field in ("group", "name", "text")}
        return Dataset.from_dict(columns)


@dataclass(frozen=True)
class FileSource:
    """A local JSONL, CSV or Parquet file."""

    path: Path
    group_column: str | None = None

    def digest(self) -> str:
        try:
            with self.path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"data.source: {self.path}: cannot be read: {error.strerror}; mend its permissions") from error

    def table(self, scratch: Path) -> Dataset:
        from datasets import Dataset

        if self.path.suffix == ".jsonl":
            check_jsonl(self.path)
        # Read into memory: the reader's own cache knows a file by its time stamp, which an edit may leave as it was.
        with quiet_datasets(), tempfile.TemporaryDirectory(dir=scratch) as folder:
            common = {"cache_dir": folder, "keep_in_memory": True}
            try:
                if self.path.suffix == ".jsonl":
                    table = Dataset.from_json(str(self.path), **common)
                elif self.path.suffix == ".csv":
                    # pandas would turn words such as "null" and "NA" into missing values.
                    table = Dataset.from_csv(str(self.path), keep_default_na=False, **common)
                else:
                    table = Dataset.from_parquet(str(self.path), **common)
            except Exception as error:  # whatever a parser raises, the file is what the user can mend
                cause = root_cause(error)
                if isinstance(cause, OSError) and cause.errno is not None:
                    raise cause from error  # `digest` could read the file, so this is the scratch folder
                raise UserError(
                    f"data.source: {self.path}: not readable as {self.path.suffix[1:]}: {in_one_line(cause)}; mend the file"
                ) from error
        return _with_rows(table, str(self.path))


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
                return datasets.load_dataset(self.name, split=self.split)
            except Exception as error:  # network, permission, spelling, script: one line serves the user for all of them
                raise UserError(
                    f"data.source: {self.name} (split {self.split}): cannot be loaded from the hub: "
                    f"{in_one_line(root_cause(error))}; "
                    "check the id, the split and the network, or give a local file"
                ) from error

    def digest(self) -> str:
        content = hashlib.sha256(repr(self._rows.features).encode())
        for batch in self._rows.with_format("arrow").iter(batch_size=1000):
            content.update(json.dumps(batch.to_pydict(), default=repr, sort_keys=True).encode())
        return content.hexdigest()

    def table(self, scratch: Path) -> Dataset:
        return _with_rows(self._rows, self.name)


def check_jsonl(path: Path) -> None:
    """Raise a UserError that names the first line that is not one JSON object."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except UnicodeDecodeError as error:
                raise UserError(f"data.source: {path}:{number}: not UTF-8 text; save the file as UTF-8") from error
            except (ValueError, RecursionError) as error:
                what = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                raise UserError(f"data.source: {path}:{number}: not valid JSON ({what}); mend or drop the line") from error
            if not isinstance(value, dict):
                raise UserError(
                    f"data.source: {path}:{number}: a {type(value).__name__}, not a JSON object; "
                    'write one {"column": value, ...} per line'
                )


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Hide the progress bars of `datasets` inside, and leave them afterwards as they were."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def root_cause(error: BaseException) -> BaseException:
    """Return what went wrong at first: `datasets` wraps it in what it was doing."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def in_one_line(error: BaseException) -> str:
    """Return the kind and the first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _with_rows(table: Dataset, name: str) -> Dataset:
    if len(table) == 0:
        raise UserError(f"data.source: {name}: no rows; give data with at least two samples")
    return table
