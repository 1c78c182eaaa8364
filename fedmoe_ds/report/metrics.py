"""`metrics.jsonl`: one JSON object per event, the stable record of a run (schema: docs/outputs.md), as it is written.

What is about very many clients goes into tables beside it (`client_tables`), and a line names each of them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from fedmoe_ds.errors import UserError
from fedmoe_ds.report.client_tables import FOLDER, MOST_LINES, OMITTED, Row, Rows, is_table, summary, table_of, write_table
from fedmoe_ds.report.record import ROWS, Record
from fedmoe_ds.storage.files import open_plain, sync


class MetricsLog:
    """Append-only writer; only rank 0 of a run constructs one.

    Every event is handed to the operating system as one complete line before `write` returns, so a killed process loses
    nothing; a line torn by a full disk or a power cut is removed, never continued. Nobody else may write to the file meanwhile:
    where somebody has, or has put another file in its place, nothing more is written.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError: the file cannot be written, or is a link, a pipe or a device."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        # O_APPEND: a write goes to the end whatever the position. Readable, to find a torn last line.
        handle = open_plain(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        # Unbuffered: what `write` returned from is with the kernel, and survives a killed process.
        self._file = open(handle, "a+b", buffering=0)  # noqa: SIM115  (lives as long as the run)
        self._drop_torn_line()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def write(self, event: str, **fields: object) -> None:
        """Append one event with the current `time` (unix seconds).

        numpy scalars and arrays become numbers and lists, non-finite floats become null.

        Raises:
            OSError: the line could not be written whole; the file is as it was before.
            UserError: somebody else has written to the file.
            TypeError: a field holds something that JSON has no word for.
        """
        assert "time" not in fields, "the time of an event is set here"
        record = {"event": event, "time": round(time.time(), 3), **fields}
        line = json.dumps(_plain(record), allow_nan=False, separators=(",", ":"), ensure_ascii=False) + "\n"
        self._check_alone()
        # Half of a surrogate pair has no UTF-8; its escape is what JSON calls it.
        encoded = line.encode(errors="backslashreplace")
        rest = memoryview(encoded)
        try:
            while rest:
                # A raw write may take a part only, for instance on a disk that is nearly full.
                rest = rest[self._file.write(rest) :]
        except OSError:
            # The torn line goes at once: the next start must not find half an event.
            self._file.truncate(self._end)
            raise
        self._end += len(encoded)

    def write_table(self, kind: str, round_index: int, rows: Iterable[Row]) -> None:
        """Put a round's `client` or `eval` events about single clients into a table, and append the `table` event.

        Raises as `write` does.
        """
        # Nothing of another job's may be replaced.
        self._check_alone()
        table = table_of(kind, rows)
        told = write_table(self.path.parent, kind, round_index, table)
        self.write("table", of=kind, round=round_index, table=told, summary=summary(table))

    def write_data(self, **facts: Any) -> None:
        """Append the `data` event; what it says of more than `MOST_LINES` clients goes into a table. Raises as `write` does."""
        clients = facts["clients"]
        if len(clients) <= MOST_LINES:
            self.write("data", **facts)
            return
        self._check_alone()
        distribution, omissions = facts.get("distribution") or {}, facts.get("omissions") or {}
        counts, omitted = distribution.get("counts"), omissions.get("clients") or {}
        table = table_of("data", (_holding(client, i, counts, omitted) for i, client in enumerate(clients)))
        told = write_table(self.path.parent, "data", 0, table)
        rest = {key: value for key, value in facts.items() if key != "clients"}
        if counts is not None:
            rest["distribution"] = {key: value for key, value in distribution.items() if key != "counts"}
        if omitted:
            rest["omissions"] = {**omissions, "clients": {}}
        self.write("data", **rest, table=told, summary=summary(table))

    def position(self) -> int:
        """Bytes written so far, after they have reached the disk: what a checkpoint stores for `truncate`."""
        self._check_alone()
        # The position goes into a checkpoint, so the bytes before it must outlive a power cut.
        os.fsync(self._file.fileno())
        return self._size()

    def truncate(self, position: int) -> None:
        """Drop everything after byte `position`: on resume, what the killed run wrote after its checkpoint, tables included.

        Raises:
            UserError: the file is shorter than the checkpoint says, so it belongs to another run or was edited.
            OSError: a table cannot be removed, or a symbolic link is in the place of their folder.
        """
        self._check_alone()
        if self._size() < position:
            raise UserError(
                f"{self.path}: {self._size()} bytes: shorter than the {position} bytes its checkpoint has seen; "
                "restore the file, or start under another run name"
            )
        # A position of an older checkpoint may lie within a line only if the file was edited.
        self._file.truncate(position)
        self._drop_torn_line()
        self._drop_tables()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def _drop_torn_line(self) -> None:
        self._file.seek(0)
        content = self._file.readall()
        if not content.endswith(b"\n"):
            self._file.truncate(content.rfind(b"\n") + 1)
        self._end = self._size()

    def _drop_tables(self) -> None:
        """Remove the tables that no line names."""
        folder = self.path.parent / FOLDER
        if folder.is_symlink():
            raise OSError(errno.ELOOP, f"{FOLDER} is a symbolic link; remove it (the run folder itself may be one)")
        if not folder.is_dir():
            return
        # The shorter record first: after a power cut none may name a table that is gone.
        os.fsync(self._file.fileno())
        named = {event[ROWS].path for event in Record(self.path) if isinstance(event.get(ROWS), Rows)}
        for path in folder.iterdir():
            if is_table(path) and path not in named:
                path.unlink()
        sync(folder)
        with contextlib.suppress(OSError):  # others may keep files there
            folder.rmdir()

    def _check_alone(self) -> None:
        """Raise UserError where the file is not as this writer has left it: two jobs in one folder, or an editor."""
        # fstat of our handle against lstat of the name: an editor that saves puts another file in its place.
        here = os.fstat(self._file.fileno())
        try:
            replaced = not os.path.samestat(here, os.lstat(self.path))
        except OSError:
            replaced = True
        if replaced or here.st_size != self._end:
            what = "has been removed or replaced" if replaced else f"has {here.st_size} bytes, this run has left {self._end}"
            raise UserError(
                f"{self.path}: {what}: another process writes to it, probably a second job in this folder; end one of them, "
                "then start again with --resume auto"
            )


def _holding(client: Row, place: int, counts: Any, omitted: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """A client's row in the table of the `data` event: `counts` are samples by label, of all clients in their order."""
    own = {f"{OMITTED}{kind}": count for kind, count in omitted.get(client["name"], {}).items()}
    return {**client, **({"counts": counts[place]} if counts is not None and len(counts) else {}), **own}


def _plain(value: object) -> object:
    """The JSON value that stands for `value`."""
    if isinstance(value, np.ndarray | np.generic):
        # numpy's float32 is no float; tolist gives Python's own numbers.
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"metrics: {type(value).__name__}: cannot be written as JSON; convert it first")
