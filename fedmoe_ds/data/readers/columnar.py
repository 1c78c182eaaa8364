"""Parquet and Arrow files: columns with types of their own."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from fedmoe_ds.data.readers.data_file import DataFile, in_one_line
from fedmoe_ds.data.table import CHUNK, Table, schema_paths, twice
from fedmoe_ds.errors import UserError


def read_parquet(file: DataFile, wanted: Collection[str]) -> Table:
    """Return the wanted columns of a Parquet file. Raises UserError for a damaged one and for two columns of one name."""
    with _told(file, "parquet"), pq.ParquetFile(file.path) as parquet:
        schema = parquet.schema_arrow
        _check_unique(file, schema)
        # The name of a part of a column reads that part alone.
        read = [".".join(path) for path in schema_paths(schema, wanted).values()]
        batches = parquet.iter_batches(batch_size=CHUNK, columns=read) if read else iter(())
        return Table.of_batches(schema, batches, wanted, parquet.metadata.num_rows, _features(schema))


def read_arrow(file: DataFile, wanted: Collection[str]) -> Table:
    """Return the wanted columns of an Arrow file (or Feather, version 2), or of an Arrow stream, which `datasets` writes.

    Raises UserError as `read_parquet` does.
    """
    with _told(file, "Arrow"), pa.memory_map(str(file.path)) as mapped:
        try:
            reader = pa.ipc.open_file(mapped)
            batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
        except pa.ArrowInvalid:  # no footer: then it is a stream, or nothing of Arrow
            mapped.seek(0)
            reader = pa.ipc.open_stream(mapped)
            batches = list(reader)
        _check_unique(file, reader.schema)
        rows = sum(batch.num_rows for batch in batches)
        return Table.of_batches(reader.schema, _cut(batches), wanted, rows, _features(reader.schema))


def _cut(batches: list[Any]) -> Iterator[Any]:
    """Yield batches of at most CHUNK rows: as objects of Python they are there for so long only."""
    for batch in batches:
        # Offsets out of a damaged file would lead anywhere in memory; nothing else looks at them.
        batch.validate(full=True)
        for start in range(0, batch.num_rows, CHUNK):
            yield batch.slice(start, CHUNK)


@contextmanager
def _told(file: DataFile, kind: str) -> Iterator[None]:
    """Turn whatever a parser raises into one line: the file is what the user can mend."""
    try:
        yield
    except (UserError, PermissionError, FileNotFoundError):  # told already, or no matter of the content
        raise
    except Exception as error:
        raise file.error(f"not readable as {kind}: {in_one_line(error)}; mend the file") from error


def _check_unique(file: DataFile, schema: Any) -> None:
    if (column := twice(schema.names)) is not None:
        raise file.error(f"column '{column}' occurs twice; rename or drop one of the two")


def _features(schema: Any) -> Any:
    """What `datasets` has noted about the columns, or None."""
    if b"huggingface" not in (schema.metadata or {}):
        return None
    from datasets import Features

    return Features.from_arrow_schema(schema)
