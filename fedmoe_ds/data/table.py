"""Table: the rows of a source, column by column, as they were written: no type is guessed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from numpy.typing import NDArray

from fedmoe_ds.distributed.stop_points import stop_point

if TYPE_CHECKING:
    from datasets import Dataset

CHUNK = 1000
"""Rows that are handled at once; as Python objects they are there for so long only."""


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


@dataclass(frozen=True)
class Table:
    """Rows of a source.

    Attributes:
        names: of all columns that the source has, in its order.
        columns: those of them that were asked for; equally long.
        classes: column -> the words of its integers, where the source itself knows them (a `ClassLabel`).
    """

    names: list[str]
    columns: dict[str, Column]
    rows: int
    classes: dict[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, column: str) -> Column:
        return self.columns[column]

    def select(self, rows: Sequence[int]) -> Table:
        """Return the rows at `rows`, which ascend."""
        chosen = np.asarray(rows, dtype=np.int64)
        columns = {name: column.select(chosen) for name, column in self.columns.items()}
        return Table(self.names, columns, len(chosen), self.classes)

    @classmethod
    def of_dataset(cls, rows: Dataset, wanted: Collection[str]) -> Table:
        """Return the wanted columns of a Hugging Face data set. Raises ValueError for text that is not UTF-8."""
        read = [name for name in rows.column_names if name in wanted]
        chunks: dict[str, list[Any]] = {name: [] for name in read}
        if read:
            for batch in rows.select_columns(read).with_format("arrow").iter(batch_size=CHUNK):
                stop_point()
                for name in read:
                    chunks[name] += [as_written(part) for part in batch.column(name).chunks]
        columns = {name: Column(parts) for name, parts in chunks.items()}
        return cls(list(rows.column_names), columns, len(rows), class_words(rows.features))


def class_words(features: Any) -> dict[str, list[str]]:
    """Return the words of every `ClassLabel` among the features of a data set."""
    words = {name: getattr(feature, "names", None) for name, feature in features.items()}
    return {name: list(names) for name, names in words.items() if names}


def as_written(values: pa.Array) -> Any:
    """Return a chunk of a typed column: text stays in Arrow, everything else becomes Python values.

    Raises ValueError for text that is not UTF-8.
    """
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        # Arrow does not check UTF-8 when it reads; a bad byte would show up much later, without its place.
        values.validate(full=True)
        return values
    return values.to_pylist()
