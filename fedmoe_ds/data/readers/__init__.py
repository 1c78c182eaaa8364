"""Readers of local files: strict, without guesses about types.

A byte order mark is passed over. Whatever else a reader does not take ends in one line with the number of the line. `READERS`
is the place for further kinds of files; those of `TEXTUAL` may be packed and have an encoding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from fedmoe_ds.data.readers.columnar import read_arrow, read_parquet
from fedmoe_ds.data.readers.data_file import COMPRESSIONS, DataFile, in_one_line, known_encoding
from fedmoe_ds.data.readers.json_rows import read_json, read_jsonl
from fedmoe_ds.data.readers.text_rows import SEPARATORS, read_csv, read_txt
from fedmoe_ds.data.table import Table

READERS: dict[str, Callable[[DataFile, Collection[str]], Table]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".txt": read_txt,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}
TEXTUAL = frozenset(READERS) - {".parquet", ".arrow"}

__all__ = ["COMPRESSIONS", "READERS", "SEPARATORS", "TEXTUAL", "DataFile", "in_one_line", "known_encoding"]
