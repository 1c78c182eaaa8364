"""Trace: a file with one device per row: its speed, its link, and when it is on (docs/devices.md).

CSV or JSONL, by the end of its name. Columns are those of `devices.profiles`, with `name`, and `client` where devices belong to
certain clients. In CSV `on` is `from:to from:to ...`. A file may be somebody else's: its size is bounded and all of it is
checked before anything is trained.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from fedmoe_ds.config import ProfileConfig
from fedmoe_ds.config.problems import explained
from fedmoe_ds.devices.builtin import BUILTIN
from fedmoe_ds.devices.profile import FIGURES, DeviceProfile, resolved
from fedmoe_ds.errors import UserError, nearest
from fedmoe_ds.storage.strict_json import parse_json

LARGEST, MOST_ROWS, LONGEST_LINE = 512 * 2**20, 1_000_000, 2**20
"""Bytes of a file, its rows, bytes of a line."""


class _Row(ProfileConfig):
    """One device."""

    name: str | None = Field(None, min_length=1, max_length=200)
    client: str | None = Field(None, min_length=1, max_length=200)


_NUMBERS = (*FIGURES, "period_s")


@dataclass(frozen=True)
class Trace:
    """Devices in the order of rows; the client of each where rows name them; SHA-256 of the file."""

    profiles: list[DeviceProfile]
    clients: list[str] | None
    digest: str


def read_trace(path: Path) -> Trace:
    """Read a file of devices. Raises UserError with the number of the first wrong line."""
    content = _content(path)
    kind = path.suffix.lower()
    if kind not in (".csv", ".jsonl"):
        raise UserError(f"devices.trace: {path}: expected a file that ends in .csv or .jsonl")
    rows = [(line, _row(path, line, fields)) for line, fields in (_csv if kind == ".csv" else _jsonl)(path, content)]
    if not rows:
        raise UserError(f"devices.trace: {path}: holds no device; give one per row")
    profiles = [_profile(path, line, row) for line, row in rows]
    return Trace(profiles, _clients(path, rows), hashlib.sha256(content.encode()).hexdigest())


def _content(path: Path) -> str:
    try:
        with path.open("rb") as file:  # a device has no end
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise UserError(f"devices.trace: {path}: cannot be read: {error.strerror or error}") from None
    if len(content) > LARGEST:
        raise UserError(f"devices.trace: {path}: more than {LARGEST >> 20} MiB; give a sample of its devices")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"devices.trace: {path}: is not UTF-8 text at byte {error.start}") from None


def _wrong(path: Path, line: int, what: str) -> UserError:
    return UserError(f"devices.trace: {path}: line {line}: {what}")


def _lines(path: Path, content: str) -> Iterator[tuple[int, str]]:
    """Lines that are not empty, with their numbers."""
    count = 0
    for number, text in enumerate(content.split("\n"), 1):
        if not text.strip():
            continue
        count += 1
        # One more than rows: a CSV has a line of names.
        if count > MOST_ROWS + 1:
            raise _wrong(path, number, f"more than {MOST_ROWS} devices; give a sample of them")
        if len(text) > LONGEST_LINE:
            raise _wrong(path, number, f"longer than {LONGEST_LINE} characters")
        yield number, text.rstrip("\r")


def _jsonl(path: Path, content: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, text in _lines(path, content):
        try:
            value = parse_json(text)
        except ValueError as error:
            raise _wrong(path, number, f"not valid JSON ({error})") from None
        if not isinstance(value, dict):
            raise _wrong(path, number, 'expected one JSON object, {"flops_per_s": ..., ...}')
        yield number, value


def _csv(path: Path, content: str) -> Iterator[tuple[int, dict[str, Any]]]:
    names: list[str] | None = None
    for number, text in _lines(path, content):
        try:
            # Line by line: no field of a device has a line's end, and an open quotation mark must not swallow the file.
            cells = [cell.strip() for cell in next(csv.reader([text], strict=True))]
        except csv.Error as error:
            raise _wrong(path, number, f"not valid CSV ({error})") from None
        if names is None:
            names = cells
            if len(set(names)) < len(names):
                raise _wrong(path, number, "names a column twice")
            continue
        if len(cells) != len(names):
            raise _wrong(path, number, f"{len(cells)} fields, and there are {len(names)} columns")
        # An empty cell is a value that is not given.
        yield number, {name: _cell(path, number, name, cell) for name, cell in zip(names, cells, strict=True) if cell}


def _cell(path: Path, line: int, name: str, cell: str) -> Any:
    try:
        if name in _NUMBERS:
            return float(cell)
        if name == "on":
            return [[float(side) for side in interval.split(":")] for interval in cell.split()]
    except ValueError:
        form = "a number" if name in _NUMBERS else "from:to from:to ..., in seconds"
        raise _wrong(path, line, f"{name}: {cell[:60]}: expected {form}") from None
    return cell


def _row(path: Path, line: int, fields: dict[str, Any]) -> _Row:
    try:
        return _Row.model_validate(fields)
    except ValidationError as error:
        raise _wrong(path, line, explained(error, _Row)[0]) from None


def _profile(path: Path, line: int, row: _Row) -> DeviceProfile:
    if row.like is not None and row.like not in BUILTIN:
        raise _wrong(path, line, f"like: {row.like}: there is no such built-in profile{nearest(row.like, BUILTIN)}")
    base = None if row.like is None else BUILTIN[row.like]
    return resolved(row.name or row.like or "traced", row, base, f"devices.trace: {path}: line {line}: ")


def _clients(path: Path, rows: list[tuple[int, _Row]]) -> list[str] | None:
    """Whom rows belong to, if all say so."""
    seen: dict[str, int] = {}
    for line, row in rows:
        if row.client is None and seen:
            raise _wrong(path, line, "client: missing, and rows above have one; name all clients, or none")
        if row.client is not None and (line != rows[0][0] and not seen):
            raise _wrong(path, line, "client: rows above have none; name all clients, or none")
        if row.client is not None and row.client in seen:
            raise _wrong(path, line, f"client: {row.client}: line {seen[row.client]} has it already")
        if row.client is not None:
            seen[row.client] = line
    return list(seen) or None
