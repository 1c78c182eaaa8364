"""Rows: collects the wanted columns of rows that come one by one, as objects of Python, into a table."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]

from fedmoe_ds.data.readers.data_file import DataFile
from fedmoe_ds.data.table import CHUNK, Column, ColumnPath, Table, paths_of
from fedmoe_ds.distributed.stop_points import stop_point


class Rows:
    """Rows of one file; `names` are all columns seen, in order.

    A wanted `a.b` is the column of that name, where any row has one, and otherwise the value of `b` inside of `a`.
    """

    def __init__(self, file: DataFile, wanted: Collection[str]) -> None:
        self.names: dict[str, None] = {}
        self._file, self._wanted, self._count = file, list(wanted), 0
        paths = [path for name in wanted for path in paths_of(name)]
        self._values: dict[ColumnPath, list[Any]] = {path: [] for path in paths}
        self._chunks: dict[ColumnPath, list[Any]] = {path: [] for path in paths}
        self._plain = [(path[0], values) for path, values in self._values.items() if len(path) == 1]
        self._nested = [(path, values) for path, values in self._values.items() if len(path) > 1]
        self._found: set[ColumnPath] = set()
        self._numbers: list[int] = []

    def add(self, row: dict[str, Any], number: int) -> None:
        """Take the row of line `number`."""
        # Rows of JSON may bring a new key at any time; the columns so far have missing values there.
        if not row.keys() <= self.names.keys():
            self.names.update(dict.fromkeys(row))
        for name, values in self._plain:
            values.append(row.get(name))
        for path, values in self._nested:
            values.append(self._inner(row, path))
        self._numbers.append(number)
        if len(self._numbers) == CHUNK:
            self._pack()

    def table(self) -> Table:
        """Return what was collected."""
        self._pack()
        names, columns = list(self.names), {}
        for name in self._wanted:
            path = next((path for path in paths_of(name) if path[0] in self.names and self._is_there(path)), None)
            if path is not None:
                columns[name] = Column(self._chunks[path])
                names += [name] if len(path) > 1 else []
        return Table(names, columns, self._count)

    def _is_there(self, path: ColumnPath) -> bool:
        return len(path) == 1 or path in self._found

    def _inner(self, row: dict[str, Any], path: ColumnPath) -> Any:
        value: Any = row
        for part in path:
            # Anything but an object has no parts: the value is missing, as it is where a key is absent.
            if not isinstance(value, dict) or part not in value:
                return None
            value = value[part]
        self._found.add(path)
        return value

    def _pack(self) -> None:
        stop_point()
        for path, values in self._values.items():
            self._chunks[path].append(self._packed(path, values))
            values.clear()
        self._count += len(self._numbers)
        self._numbers = []

    def _packed(self, path: ColumnPath, values: list[Any]) -> Any:
        try:
            # Large strings have 64-bit offsets: a chunk of documents may exceed 2 GiB.
            return pa.array(values, type=pa.large_string())
        except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeEncodeError):  # other values than text, or no text
            for value, number in zip(values, self._numbers, strict=True):
                if not _encodable(value):
                    raise self._file.error(
                        f"column '{'.'.join(path)}' holds half of a surrogate pair, which is no character; mend or "
                        "drop the line",
                        number,
                    ) from None
            return list(values)


def _encodable(value: Any) -> bool:
    """Whether all text in a value has an encoding; a list of messages holds text as well."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return False
    elif isinstance(value, list):
        return all(map(_encodable, value))
    elif isinstance(value, dict):
        return all(map(_encodable, value)) and all(map(_encodable, value.values()))
    return True
