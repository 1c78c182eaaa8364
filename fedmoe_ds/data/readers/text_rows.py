"""CSV and plain text: every value is text, as it stands there.

CSV has a header and double quotes as RFC 4180 says, and a comma, or what `data.separator` says, between two fields; a file that
ends in `.tsv` has a tab. Every row has the header's number of fields, no column comes twice. An empty value is the empty text.
Empty lines are passed over.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from fedmoe_ds.data.readers.data_file import DataFile
from fedmoe_ds.data.readers.rows import Rows
from fedmoe_ds.data.table import Table, twice

SEPARATORS = {".csv": ",", ".tsv": "\t"}
_LIKELY = ",;\t|"


def read_csv(file: DataFile, wanted: Collection[str]) -> Table:
    """Return the wanted columns of a CSV file, all of them text. Raises UserError with the line's number."""
    separator = file.separator or SEPARATORS[file.ending]
    rows, header = Rows(file, wanted), None
    for number, fields in _csv_rows(file, separator):
        if header is None:
            header = fields
            _check_header(file, header, separator, number, wanted)
            rows.names.update(dict.fromkeys(header))
            continue
        if len(fields) != len(header):
            raise file.error(
                f"{len(fields)} fields, and the header has {len(header)} ({', '.join(header)}); mend the row: quote text that "
                f"holds {_spelt(separator)}",
                number,
            )
        rows.add(dict(zip(header, fields, strict=True)), number)
    return rows.table()


def read_txt(file: DataFile, wanted: Collection[str]) -> Table:
    """Return the whole file as one row with the column `text`."""
    rows = Rows(file, wanted)
    rows.add({"text": "".join(file.pieces())}, 1)
    return rows.table()


def _check_header(file: DataFile, header: list[str], separator: str, number: int, wanted: Collection[str]) -> None:
    if (column := twice(header)) is not None:
        raise file.error(f"column '{column}' occurs twice; rename or drop one of the two", number)
    # Other programs write other separators: the whole header is one column then, and nobody asked for it.
    other = next((mark for mark in _LIKELY if mark != separator and mark in header[0]), None)
    if len(header) == 1 and other is not None and header[0] not in wanted:
        raise file.error(
            f"a single column, '{header[0]}', and no {_spelt(separator)} in the header; name what separates the fields: "
            f"data.separator={_spelt(other)}",
            number,
        )


def _spelt(separator: str) -> str:
    """As a configuration would say it."""
    return {",": "commas", "\t": '"\\t"'}.get(separator, f"'{separator}'")


def _csv_rows(file: DataFile, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (number of its first line, fields) of every row that is not empty."""
    with _long_fields():
        # strict: otherwise a quote that never ends would silently take in the rest of the file.
        reader = csv.reader(_lines(file), strict=True, delimiter=separator)
        while True:
            # Taken before the row is read: a quoted field may span many lines.
            number = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise file.error(f"not valid CSV ({error}), in the row that begins there; mend its quotes", number) from error
            if fields:
                yield number, fields


def _lines(file: DataFile) -> Iterator[str]:
    """Yield lines with their ends: LF, CR LF, or CR alone."""
    for _, line in file.lines():
        if "\r" not in line:
            yield line
        else:
            # Not str.splitlines, which would cut a text at U+2028, too.
            yield from io.StringIO(line, newline="")


@contextmanager
def _long_fields() -> Iterator[None]:
    """Lift the limit of the csv module inside: a field may be a whole document."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(limit)
