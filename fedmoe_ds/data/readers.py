"""Readers of local files: strict, without guesses about types.

* JSONL: one object per line, UTF-8, as RFC 8259 has it: no key twice, no NaN, no half of a surrogate pair in a column that is
  used. A value has the type that it is written with.
* CSV: comma, double quote, a header, as RFC 4180 has it: every row has the header's number of fields, no column twice. Every
  value is text, as it stands there; an empty one is the empty text. Empty lines are passed over.
* Parquet: the file's own types.

A byte order mark is passed over. Whatever else is there ends in one line with the number of the line. `READERS` is the place
for further kinds of files.
"""

from __future__ import annotations

import codecs
import csv
import json
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from fedmoe_ds.data.table import CHUNK, Column, Table, as_written, class_words
from fedmoe_ds.distributed.stop_points import stop_point
from fedmoe_ds.errors import UserError
from fedmoe_ds.storage.strict_json import check_depth, trouble


def read_jsonl(path: Path, wanted: Collection[str]) -> Table:
    """Return the wanted columns of a JSONL file; an absent key is a missing value. Raises UserError with the line's number."""
    rows = _Rows(path, wanted)
    # Python's decoder would keep the last of two equal keys, and take NaN.
    decode = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant).decode
    # Binary lines: decoding line by line keeps the number of a line that is not UTF-8.
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            text = _text(raw, path, number)
            if not text.strip():
                continue
            try:
                value = decode(text)
                check_depth(text, value)
            except (ValueError, RecursionError) as error:
                what = error.msg if isinstance(error, json.JSONDecodeError) else trouble(error)
                raise UserError(f"data.source: {path}:{number}: not valid JSON ({what}); mend or drop the line") from error
            if not isinstance(value, dict):
                raise UserError(
                    f"data.source: {path}:{number}: a {type(value).__name__}, not a JSON object; "
                    'write one {"column": value, ...} per line'
                )
            rows.add(value, number)
    return rows.table()


def read_csv(path: Path, wanted: Collection[str]) -> Table:
    """Return the wanted columns of a CSV file, all of them text. Raises UserError with the line's number."""
    rows, header = _Rows(path, wanted), None
    for number, fields in _csv_rows(path):
        if header is None:
            header = fields
            _check_unique(header, f"{path}:{number}")
            rows.names.update(dict.fromkeys(header))
            continue
        if len(fields) != len(header):
            raise UserError(
                f"data.source: {path}:{number}: {len(fields)} fields, and the header has {len(header)} "
                f"({', '.join(header)}); mend the row: quote text that holds commas"
            )
        rows.add(dict(zip(header, fields, strict=True)), number)
    return rows.table()


def read_parquet(path: Path, wanted: Collection[str]) -> Table:
    """Return the wanted columns of a Parquet file. Raises UserError for a damaged one and for two columns of one name."""
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            _check_unique(schema.names, str(path))
            chunks: dict[str, list[Any]] = {name: [] for name in schema.names if name in wanted}
            if chunks:
                for batch in file.iter_batches(batch_size=CHUNK, columns=list(chunks)):
                    stop_point()
                    for name, parts in chunks.items():
                        parts.append(as_written(batch.column(name)))
            columns = {name: Column(parts) for name, parts in chunks.items()}
            return Table(list(schema.names), columns, file.metadata.num_rows, _classes(schema))
    # Our own one-line errors pass; what follows would wrap them once more.
    except UserError:
        raise
    except Exception as error:  # whatever a parser raises, the file is what the user can mend
        raise UserError(f"data.source: {path}: not readable as parquet: {in_one_line(error)}; mend the file") from error


READERS: dict[str, Callable[[Path, Collection[str]], Table]] = {
    ".jsonl": read_jsonl,
    ".csv": read_csv,
    ".parquet": read_parquet,
}


class _Rows:
    """Collects the wanted values of rows that come one by one; `names` are all columns seen, in order."""

    def __init__(self, path: Path, wanted: Collection[str]) -> None:
        self.names: dict[str, None] = {}
        self._path, self._count = path, 0
        self._values: dict[str, list[Any]] = {name: [] for name in wanted}
        self._chunks: dict[str, list[Any]] = {name: [] for name in wanted}
        self._numbers: list[int] = []

    def add(self, row: dict[str, Any], number: int) -> None:
        """Take the row of line `number`."""
        # Rows of JSONL may bring a new key at any time; the columns so far have missing values there.
        if not row.keys() <= self.names.keys():
            self.names.update(dict.fromkeys(row))
        for name, values in self._values.items():
            values.append(row.get(name))
        self._numbers.append(number)
        if len(self._numbers) == CHUNK:
            self._pack()

    def table(self) -> Table:
        self._pack()
        columns = {name: Column(parts) for name, parts in self._chunks.items() if name in self.names}
        return Table(list(self.names), columns, self._count)

    def _pack(self) -> None:
        stop_point()
        for name, values in self._values.items():
            self._chunks[name].append(self._packed(name, values))
            self._values[name] = []
        self._count += len(self._numbers)
        self._numbers = []

    def _packed(self, name: str, values: list[Any]) -> Any:
        try:
            # Large strings have 64-bit offsets: a chunk of documents may exceed 2 GiB.
            return pa.array(values, type=pa.large_string())
        except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeEncodeError):  # other values than text, or no text
            for value, number in zip(values, self._numbers, strict=True):
                if isinstance(value, str) and not _encodable(value):
                    raise UserError(
                        f"data.source: {self._path}:{number}: column '{name}' holds half of a surrogate pair, which is no "
                        "character; mend or drop the line"
                    ) from None
            return values


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (number of its first line, fields) of every row that is not empty."""
    with path.open("rb") as file, _long_fields():
        # strict: otherwise a quote that never ends would silently take in the rest of the file.
        reader = csv.reader(_lines(file, path), strict=True)
        while True:
            # Taken before the row is read: a quoted field may span many lines.
            number = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise UserError(
                    f"data.source: {path}:{number}: not valid CSV ({error}), in the row that begins there; mend its quotes"
                ) from error
            if fields:
                yield number, fields


def _lines(file: Any, path: Path) -> Iterator[str]:
    """Yield lines with their ends: LF, CR LF, or CR alone."""
    number = 0
    for raw in file:
        # bytes.splitlines knows LF, CR LF and CR only; str.splitlines would cut a text at U+2028, too.
        for line in raw.splitlines(keepends=True):
            number += 1
            yield _text(line, path, number)


@contextmanager
def _long_fields() -> Iterator[None]:
    """Lift the limit of the csv module inside: a field may be a whole document."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _text(raw: bytes, path: Path, number: int) -> str:
    try:
        return (raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"data.source: {path}:{number}: not UTF-8 text; save the file as UTF-8") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"key '{_twice([key for key, _ in pairs])}' occurs twice")
    return row


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is no JSON number")


def _check_unique(names: Sequence[str], where: str) -> None:
    if len(set(names)) < len(names):
        raise UserError(f"data.source: {where}: column '{_twice(names)}' occurs twice; rename or drop one of the two")


def _twice(names: Sequence[str]) -> str:
    return next(name for index, name in enumerate(names) if name in names[:index])


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _classes(schema: Any) -> dict[str, list[str]]:
    if b"huggingface" not in (schema.metadata or {}):
        return {}
    from datasets import Features

    return class_words(Features.from_arrow_schema(schema))


def in_one_line(error: BaseException) -> str:
    """Return the kind and the first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
