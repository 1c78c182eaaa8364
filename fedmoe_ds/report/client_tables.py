"""Client tables: rows about many clients as Parquet files beside `metrics.jsonl` (docs/outputs.md has the columns).

A line of `metrics.jsonl` names every table that belongs to the record, with its rows and its SHA-256. A file that no line names
is what a killed process has left, and is nobody's.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from numpy.typing import NDArray

from fedmoe_ds.errors import UserError
from fedmoe_ds.report.events import LABEL
from fedmoe_ds.storage.files import make_folder, open_plain, sync, write_whole

MOST_LINES = 500
"""Rows about clients that are lines of `metrics.jsonl`, per round and kind; more become a table."""
FOLDER = "clients"
_TEXT, _WHOLE, _REAL, _COUNTS = pa.string(), pa.int64(), pa.float64(), pa.list_(pa.int64())
COLUMNS: dict[str, dict[str, Any]] = {
    "client": {
        "client": _TEXT, "tier_label": _TEXT, "top_k": _WHOLE, "steps": _WHOLE, "tokens": _WHOLE, "targets": _WHOLE,
        "active_experts": _WHOLE, "rank": _WHOLE, "flops": _REAL, "loss_first": _REAL, "loss_last": _REAL, "seconds": _REAL,
        "status": _TEXT, "rescaler": _REAL, "device": _TEXT, "virtual_s": _REAL, "down_s": _REAL, "compute_s": _REAL,
        "up_s": _REAL, "joules": _REAL, "down_bytes": _WHOLE, "up_bytes": _WHOLE, "delay": _WHOLE, "experts_held": _COUNTS,
        "probe_tokens": _WHOLE, "change_norm": _REAL,
    },
    "eval": {
        "client": _TEXT, "tier_label": _TEXT, "tier": _WHOLE, "perplexity": _REAL, "accuracy": _REAL, "loss": _REAL,
        "targets": _WHOLE, "exact_match": _REAL, "ranked_choice": _REAL, "view_0": _REAL,
        "view_1": _REAL, "samples": _WHOLE,
    },
    "data": {
        "name": _TEXT, "tier_label": _TEXT, "top_k": _WHOLE, "samples": _WHOLE, "sequences": _WHOLE, "targets": _WHOLE,
        "counts": _COUNTS,
    },
}  # fmt: skip
"""Columns of each kind of row in their order; a column in which no row has a value may be absent."""
HELD = "experts_held"
"""How many experts a client could use, layer by layer; absent where it could use all."""
OMITTED = "omitted_"
"""Before the kind of an omission: its number of samples, in `data`."""
_STEMS = {"client": "round", "eval": "eval"}
_CHUNK = 2**16
MENDED = "restore the file from a copy"
Row = Mapping[str, Any]


def file_name(kind: str, round_index: int) -> str:
    """The place of a table below the run folder."""
    return f"{FOLDER}/data.parquet" if kind == "data" else f"{FOLDER}/{_STEMS[kind]}-{round_index:06d}.parquet"


def table_of(kind: str, rows: Iterable[Row]) -> pa.Table:
    """Rows as columns; a number that is not finite is null. Raises TypeError where a field is of another type."""
    rows, parts = iter(rows), []
    # In parts: whoever has a million rows need not hold them all as mappings.
    while chunk := list(itertools.islice(rows, _CHUNK)):
        omitted = {name: _WHOLE for row in chunk for name in row if name.startswith(OMITTED)} if kind == "data" else {}
        columns = {**COLUMNS[kind], **omitted}
        parts.append(pa.table({name: _column(name, form, chunk) for name, form in columns.items()}))
    table = pa.concat_tables(parts, promote_options="default").combine_chunks()
    kept = [name for name in table.column_names if table[name].null_count < len(table)]
    return table.select(kept)


def _column(name: str, form: Any, rows: list[Row]) -> Any:
    # Rows of an unfinished round of an older version have no label: their top-k is it.
    values = [row["tier_label"] if "tier_label" in row else str(row["top_k"]) for row in rows] if name == "tier_label" else None
    values = [row.get(name) for row in rows] if values is None else values
    if form is _REAL:
        numbers = np.array(values, dtype=np.float64)
        return pa.array(numbers, mask=~np.isfinite(numbers))
    if form is _TEXT:
        # Half of a surrogate pair has no UTF-8: its escape, as in other texts of a run.
        values = [None if value is None else str(value).encode(errors="backslashreplace").decode() for value in values]
    try:
        return pa.array(values, form)
    except (pa.ArrowException, OverflowError) as error:
        raise TypeError(f"metrics: {name}: cannot be written as a column ({error})") from None


def write_table(folder: Path, kind: str, round_index: int, table: pa.Table) -> dict[str, Any]:
    """Write a table below the run folder and onto the disk, and return what a line of `metrics.jsonl` says of it: `file`,
    `rows`, `sha256`. Raises OSError."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=2**17)
    content, name = sink.getvalue(), file_name(kind, round_index)
    make_folder(folder / FOLDER)
    write_whole(folder / name, memoryview(content))
    # The line that names it may reach the disk at any time after this: the table has to be there.
    sync(folder / name)
    sync(folder / FOLDER)
    return {"file": name, "rows": len(table), "sha256": hashlib.sha256(content).hexdigest()}


@dataclass(frozen=True)
class Rows:
    """A table that a line of `metrics.jsonl` names; read when it is asked for.

    Attributes:
        path: of the file.
        kind: one of `COLUMNS`.
        time: of the line, which is that of all its rows.
    """

    path: Path
    kind: str
    count: int
    sha256: str
    round: int = 0
    time: float | None = None

    def read(self) -> pa.Table:
        """The whole table, its types and values checked as those of lines are.

        Raises:
            UserError: it is missing, a link, damaged, or another one than the line says.
        """
        content = self._content()
        try:
            file = pq.ParquetFile(pa.BufferReader(content))
            # Before anything is decoded: a foreign file may say that it holds more than fits into memory.
            if file.metadata.num_rows != self.count:
                raise ValueError(f"holds {file.metadata.num_rows} rows, its line in metrics.jsonl says {self.count}")
            table = file.read(columns=[name for name in file.schema_arrow.names if self._known(name)])
            _check(self.kind, table)
        except (pa.ArrowException, ValueError, OSError, KeyError) as error:
            what = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{self.path}: is no table of this run: {what}; {MENDED}") from None
        return table

    def _content(self) -> bytes:
        try:
            if self.path.parent.is_symlink():
                raise OSError(0, f"{FOLDER} is a symbolic link")
            with open(open_plain(self.path, os.O_RDONLY), "rb") as file:
                content = file.read()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read: {error.strerror or error}; {MENDED}") from None
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise UserError(f"{self.path}: is not what its line in metrics.jsonl says (SHA-256 differs); {MENDED}")
        return content

    def _known(self, name: str) -> bool:
        return name in COLUMNS[self.kind] or (self.kind == "data" and name.startswith(OMITTED))

    def rows(self) -> Iterator[dict[str, Any]]:
        """Row by row, as the lines of a smaller run have them, without `event`, `time` and `round`."""
        for batch in self.read().to_batches(_CHUNK):
            yield from batch.to_pylist()

    def events(self) -> Iterator[dict[str, Any]]:
        """The events `client` or `eval` that a smaller run would have written."""
        head: dict[str, Any] = {"event": self.kind, "time": self.time, "round": self.round}
        for row in self.rows():
            # The old name of `targets`, as in lines.
            extra = {"split": "client", "tokens": row.get("targets")} if self.kind == "eval" else {}
            yield head | extra | row


def _check(kind: str, table: pa.Table) -> None:
    """Raise ValueError naming the first column that readers cannot take."""
    needed = ("name" if kind == "data" else "client", "tier_label", *(("status",) if kind == "client" else ()))
    for name in needed:
        if name not in table.column_names:
            raise ValueError(f"column {name} is missing")
        if table[name].null_count:
            raise ValueError(f"column {name} has rows without a value")
    for name in table.column_names:
        form = COLUMNS[kind].get(name, _WHOLE)
        if table.schema.field(name).type != form:
            raise ValueError(f"column {name} is {table.schema.field(name).type}, and not {form}")
        _check_values(name, form, table[name])
    for label in pc.unique(table["tier_label"]).to_pylist():
        if not re.fullmatch(LABEL, label):
            raise ValueError(f"column tier_label: {label!r} is no tier")


def _check_values(name: str, form: Any, column: Any) -> None:
    if form is _TEXT or len(column) == 0:
        return
    if form is _COUNTS:
        # A client may have held all experts, and then has no list.
        column = column.drop_null() if name == HELD else column
        lengths = pc.unique(pc.list_value_length(column)).to_pylist()
        if len(lengths) != 1 or not lengths[0]:
            raise ValueError(f"column {name} has lists of different lengths")
        column = pc.list_flatten(column)
        if column.null_count:
            raise ValueError(f"column {name} has lists without a number")
    if form is _REAL:
        if not pc.all(pc.is_finite(column), min_count=0).as_py():
            raise ValueError(f"column {name} has numbers that are not finite")
        least = -np.inf if name.startswith("loss") or name in ("rescaler", "accuracy", "exact_match", "ranked_choice") else 0.0
    else:
        least = 0
    low = pc.min(column).as_py()
    if low is not None and low < least:
        raise ValueError(f"column {name} has numbers below 0")


def numbers(table: pa.Table, name: str) -> NDArray[np.float64]:
    """A column of numbers, or of the means of lists, as [rows] float64, NaN where there is none, or no such column."""
    found: NDArray[np.float64] = np.full(len(table), np.nan)
    if name not in table.column_names:
        return found
    column = table[name]
    if column.type == _COUNTS:
        told = column.is_valid().to_numpy()
        # All lists of a column are equally long.
        found[told] = pc.list_flatten(column).to_numpy().reshape(int(told.sum()), -1).mean(1)
        return found
    return column.cast(_REAL, safe=False).to_numpy().astype(np.float64)  # type: ignore[no-any-return]


def summary(table: pa.Table) -> dict[str, Any]:
    """Of every column of numbers how many rows have one, and its quantiles, sum and mean; how often each status occurs."""
    found: dict[str, Any] = {}
    for name in table.column_names:
        if table.schema.field(name).type not in (_WHOLE, _REAL) or name in ("round", "top_k", "tier"):
            continue
        values = numbers(table, name)
        values = values[np.isfinite(values)]
        names, shares = ("least", "q25", "median", "q75", "most"), (0, 0.25, 0.5, 0.75, 1)
        quantiles = dict(zip(names, np.quantile(values, shares, method="inverted_cdf"), strict=True))
        found[name] = {"rows": len(values), **quantiles, "mean": values.mean(), "sum": values.sum()}
    if "status" in table.column_names:
        found["status"] = {item["values"]: item["counts"] for item in table["status"].value_counts().to_pylist()}
    return found


def is_table(path: Path) -> bool:
    """Whether a file in `clients` is one that a run writes there, or its draft."""
    return bool(re.fullmatch(r"(data|(round|eval)-\d{6,})\.parquet|\.draft-.*\.tmp", path.name))
