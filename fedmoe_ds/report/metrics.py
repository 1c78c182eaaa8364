"""`metrics.jsonl`: one JSON object per event, the stable record of a run (schema: docs/outputs.md)."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from fedmoe_ds.errors import UserError
from fedmoe_ds.report.events import wrong_field
from fedmoe_ds.strict_json import parse_json


class MetricsLog:
    """Append-only writer; only rank 0 of a run constructs one.

    Every event is handed to the operating system as one complete line before `write` returns, so a killed process loses
    nothing; a line torn by a full disk or a power cut is removed, never continued.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115  (lives as long as the run)
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
            TypeError: a field holds something that JSON has no word for.
        """
        assert "time" not in fields, "the time of an event is set here"
        record = {"event": event, "time": round(time.time(), 3), **fields}
        line = json.dumps(_plain(record), allow_nan=False, separators=(",", ":"), ensure_ascii=False) + "\n"
        start = self._size()
        rest = memoryview(line.encode())
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            self._file.truncate(start)
            raise

    def position(self) -> int:
        """Bytes written so far, after they have reached the disk: what a checkpoint stores for `truncate`."""
        os.fsync(self._file.fileno())
        return self._size()

    def truncate(self, position: int) -> None:
        """Drop everything after byte `position`: on resume, what the killed run wrote after its checkpoint.

        Raises:
            UserError: the file is shorter than the checkpoint says, so it belongs to another run or was edited.
        """
        if self._size() < position:
            raise UserError(
                f"{self.path}: {self._size()} bytes: shorter than the {position} bytes its checkpoint has seen; "
                "restore the file, or start under another run name"
            )
        self._file.truncate(position)
        self._drop_torn_line()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def _drop_torn_line(self) -> None:
        if self._size() == 0:
            return
        content = self.path.read_bytes()
        if not content.endswith(b"\n"):
            self._file.truncate(content.rfind(b"\n") + 1)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return all events in the order of writing; an unfinished last line (a run killed in a write) is left out.

    Raises:
        UserError: the file is missing, or a complete line is no event, or a field of it has not the type that readers take.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name the folder of a run that has started") from None
    complete = content[: content.rfind(b"\n") + 1]
    return [_event(path, number, line) for number, line in enumerate(complete.splitlines(), start=1) if line.strip()]


def _event(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = parse_json(line)
    except ValueError as error:
        raise UserError(f"{path}: line {number}: is not JSON ({error}); remove or repair the line") from None
    if not isinstance(record, dict) or not isinstance(record.get("event"), str):
        raise UserError(f"{path}: line {number}: is no event; every line is an object with a string 'event'")
    if (wrong := wrong_field(record)) is not None:
        raise UserError(f"{path}: line {number}: {wrong}; remove or repair the line")
    return record


def _plain(value: object) -> object:
    """The JSON value that stands for `value`."""
    if isinstance(value, np.ndarray | np.generic):
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
