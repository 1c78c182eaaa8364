"""Record: what a run has written down, read event by event, so that a long record need not fit into memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedmoe_ds.errors import UserError
from fedmoe_ds.report.client_tables import OMITTED, Rows
from fedmoe_ds.report.events import wrong_field
from fedmoe_ds.storage.strict_json import parse_json

ROWS = "rows"
"""Of a `table` event, and of a `data` event with a table: its `Rows`, unread."""


class Record:
    """The events of a `metrics.jsonl` in the order of writing; every iteration reads the file anew.

    An unfinished last line (a run killed in a write) is left out. A table is one event, `table`: whoever looks at single
    clients reads its `rows`; `read_metrics` does so for all of them.

    Args:
        path: of `metrics.jsonl`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Raises UserError: the file is missing, or a complete line is no event, or a field of it has not the type that readers
        take."""
        try:
            with self.path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    # Before parsing: an unfinished line would be reported as damaged.
                    if line.endswith(b"\n") and line.strip():
                        yield self._with_rows(_event(self.path, number, line))
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be read ({error.strerror}); name the folder of a run that has started"
            ) from None

    def _with_rows(self, event: dict[str, Any]) -> dict[str, Any]:
        if event["event"] in ("table", "data") and (table := event.get("table")):
            # Of a `data` event neither field is one that readers know: a foreign one may hold anything.
            kind, round_index = (event["of"], event["round"]) if event["event"] == "table" else ("data", 0)
            place = self.path.parent / table["file"]
            event[ROWS] = Rows(place, kind, table["rows"], table["sha256"], round_index, event.get("time"))
        return event


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return all events in the order of writing, each client's on its own, wherever they are stored.

    Raises:
        UserError: as `Record`, or a table is missing or damaged.
    """
    return [one for event in Record(path) for one in expanded(event)]


def expanded(event: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The events that an event of a `Record` stands for: as if all rows were lines. Raises UserError as `Rows.read`."""
    rows = event.get(ROWS)
    if not isinstance(rows, Rows):
        yield event
    elif event["event"] == "table":
        yield from rows.events()
    else:
        yield _whole_data(event, rows)


def _whole_data(event: dict[str, Any], rows: Rows) -> dict[str, Any]:
    """A `data` event with its clients, their samples by label, and what was omitted of them."""
    clients, counts, omitted = [], [], {}
    for row in rows.rows():
        kinds = {name.removeprefix(OMITTED): row.pop(name) for name in list(row) if name.startswith(OMITTED)}
        counts.append(row.pop("counts", None))
        if kinds := {kind: count for kind, count in kinds.items() if count is not None}:
            omitted[row["name"]] = kinds
        clients.append({**row, "tokens": row.get("targets")})
    whole = {key: value for key, value in event.items() if key not in (ROWS, "table", "summary")} | {"clients": clients}
    if counts and counts[0] is not None:
        whole["distribution"] = {**(event.get("distribution") or {}), "counts": counts}
    if event.get("omissions"):
        whole["omissions"] = {**event["omissions"], "clients": omitted}
    return whole


def _event(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = parse_json(line, halves=True)
    except ValueError as error:
        raise UserError(f"{path}: line {number}: is not JSON ({error}); remove or repair the line") from None
    if not isinstance(record, dict) or not isinstance(record.get("event"), str):
        raise UserError(f"{path}: line {number}: is no event; every line is an object with a string 'event'")
    if (wrong := wrong_field(record)) is not None:
        raise UserError(f"{path}: line {number}: {wrong}; remove or repair the line")
    return record
