"""Table: the rows of a source, column by column, as they were written: no type is guessed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
from numpy.typing import NDArray

from fedmoe_ds.distributed.stop_points import stop_point

if TYPE_CHECKING:
    from datasets import Dataset

CHUNK = 1000
"""Rows that are handled at once; as Python objects they are there for so long only."""
ColumnPath = tuple[str, ...]
"""The name of a column, and then the names of parts inside of it."""


class Column:
    """The values of one column, in chunks: Arrow text, which takes no more memory than the file, or lists of Python values."""

    def __init__(self, chunks: Sequence[Any]) -> None:
        self._chunks = chunks
        self._ends = np.cumsum([0, *map(len, chunks)])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __iter__(self) -> Iterator[Any]:
        for chunk in self._chunks:
            yield from chunk if isinstance(chunk, list) else chunk.to_pylist()

    def select(self, rows: NDArray[np.int64]) -> Column:
        """Return the values at `rows`, which ascend."""
        # Rows ascend, so each chunk's share of them is one slice.
        bounds = np.searchsorted(rows, self._ends)
        chosen = []
        for index, chunk in enumerate(self._chunks):
            inside = rows[bounds[index] : bounds[index + 1]] - self._ends[index]
            # A selected chunk keeps its kind: text stays in Arrow, without a detour through Python objects.
            chosen.append([chunk[row] for row in inside] if isinstance(chunk, list) else chunk.take(pa.array(inside)))
        return Column(chosen)

    @classmethod
    def joined(cls, columns: Iterable[Column]) -> Column:
        """Return the values of all columns, one after the other."""
        chunks: list[Any] = []
        for chunk in (chunk for column in columns for chunk in column._chunks):
            last = chunks[-1] if chunks else None
            # A thousand files of one row are one chunk: every chunk costs time, whatever its length.
            if last is None or len(last) + len(chunk) > CHUNK or not _alike(last, chunk):
                chunks.append(chunk)
            else:
                chunks[-1] = [*last, *chunk] if isinstance(chunk, list) else pa.concat_arrays([last, chunk])
        return cls(chunks)


@dataclass(frozen=True)
class Table:
    """Rows of a source.

    Attributes:
        names: of all columns that the source has, in its order.
        columns: those of them that were asked for; equally long.
        classes: column -> the words of its integers, where the source itself knows them (a `ClassLabel`).
        files: (name, rows) of the files that the rows are from, one after the other, where there are several.
    """

    names: list[str]
    columns: dict[str, Column]
    rows: int
    classes: dict[str, list[str]] = field(default_factory=dict)
    files: Sequence[tuple[str, int]] = ()

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, column: str) -> Column:
        return self.columns[column]

    def place(self, row: int) -> str:
        """Return what a message calls a row: its number from 1, and the file that it is in."""
        for name, rows in self.files:
            if row < rows:
                return f"row {row + 1} of {name}"
            row -= rows
        return f"row {row + 1}"

    def select(self, rows: Sequence[int]) -> Table:
        """Return the rows at `rows`, which ascend."""
        chosen = np.asarray(rows, dtype=np.int64)
        columns = {name: column.select(chosen) for name, column in self.columns.items()}
        return Table(self.names, columns, len(chosen), self.classes)

    @classmethod
    def concat(cls, tables: Mapping[str, Table]) -> Table:
        """Return the rows of all tables, which have a name each. A column that one of them lacks has missing values there."""
        names = list(dict.fromkeys(name for table in tables.values() for name in table.names))
        columns = {}
        for name in dict.fromkeys(name for table in tables.values() for name in table.columns):
            parts = (table.columns.get(name, Column([[None] * len(table)])) for table in tables.values())
            columns[name] = Column.joined(parts)
        classes = {name: words for table in tables.values() for name, words in table.classes.items()}
        files = [(name, len(table)) for name, table in tables.items()]
        return cls(names, columns, sum(map(len, tables.values())), classes, files)

    @classmethod
    def of_batches(cls, schema: pa.Schema, batches: Iterable[Any], wanted: Collection[str], rows: int, features: Any) -> Table:
        """Return the wanted columns of Arrow record batches.

        Args:
            features: those of `datasets`, where they are known, or None.
        Raises:
            ValueError: for text that is not UTF-8.
        """
        paths = schema_paths(schema, wanted)
        chunks: dict[str, list[Any]] = {name: [] for name in paths}
        for batch in batches:
            stop_point()
            for name, (column, *parts) in paths.items():
                values = batch.column(column)
                # A missing outer value makes the inner one missing, too.
                chunks[name].append(as_written(pc.struct_field(values, parts) if parts else values))
        columns = {name: Column(parts) for name, parts in chunks.items()}
        names = [*schema.names, *(name for name, path in paths.items() if len(path) > 1)]
        return cls(names, columns, rows, class_words(features or {}, paths))

    @classmethod
    def of_dataset(cls, rows: Dataset, wanted: Collection[str]) -> Table:
        """Return the wanted columns of a Hugging Face data set. Raises ValueError for text that is not UTF-8."""
        schema = rows.features.arrow_schema
        read = sorted({path[0] for path in schema_paths(schema, wanted).values()})
        tables = rows.select_columns(read).with_format("arrow").iter(batch_size=CHUNK) if read else iter(())
        batches = (batch for table in tables for batch in table.to_batches())
        return cls.of_batches(schema, batches, wanted, len(rows), rows.features)


def paths_of(name: str) -> list[ColumnPath]:
    """Return where a column of this name may be, the likeliest first: under the name itself, or inside of another column."""
    parts = tuple(name.split("."))
    return [(name,), parts] if len(parts) > 1 else [(name,)]


def schema_paths(schema: pa.Schema, wanted: Collection[str]) -> dict[str, ColumnPath]:
    """Return wanted name -> where it is, for those that there are, in the order of the schema."""
    found = {}
    for name in wanted:
        path = next((path for path in paths_of(name) if _has(schema, path)), None)
        if path is not None:
            found[name] = path
    # Sets have no order: the same columns are read in the same order in every run.
    return dict(sorted(found.items(), key=lambda item: (schema.names.index(item[1][0]), item[0])))


def twice(names: Sequence[str]) -> str | None:
    """Return the first name that occurs a second time."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _has(schema: pa.Schema, path: ColumnPath) -> bool:
    if path[0] not in schema.names:
        return False
    kind = schema.field(path[0]).type
    for part in path[1:]:
        if not pa.types.is_struct(kind) or kind.get_field_index(part) < 0:
            return False
        kind = kind.field(part).type
    return True


def class_words(features: Any, paths: Mapping[str, ColumnPath]) -> dict[str, list[str]]:
    """Return the words of every `ClassLabel` among the columns at `paths` of a data set."""
    words = {}
    for name, path in paths.items():
        feature = features
        for part in path:
            feature = feature.get(part) if isinstance(feature, dict) else None
        words[name] = getattr(feature, "names", None)
    return {name: list(names) for name, names in words.items() if names}


def _alike(one: Any, other: Any) -> bool:
    return isinstance(one, list) == isinstance(other, list) and (isinstance(one, list) or one.type == other.type)


def as_written(values: pa.Array) -> Any:
    """Return a chunk of a typed column: text stays in Arrow, everything else becomes Python values.

    Raises ValueError for text that is not UTF-8.
    """
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        # Arrow does not check UTF-8 when it reads; a bad byte would show up much later, without its place.
        values.validate(full=True)
        return values
    return values.to_pylist()
