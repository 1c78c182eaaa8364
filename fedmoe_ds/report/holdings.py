"""Holdings: what every client of a run has: its data and its tier, out of the `data` event or of the table that it names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from fedmoe_ds.errors import UserError
from fedmoe_ds.report import formats
from fedmoe_ds.report.by_client import tier_of
from fedmoe_ds.report.client_tables import MENDED, OMITTED, Rows
from fedmoe_ds.report.record import ROWS

Event = Mapping[str, Any]


class Holdings:
    """The clients of a `data` event in their order; none where the event is not there yet.

    Raises:
        UserError: the table is missing or damaged; at the first look.
    """

    def __init__(self, event: Event) -> None:
        self.event = event
        rows = event.get(ROWS)
        self._rows = rows if isinstance(rows, Rows) else None

    @cached_property
    def _table(self) -> Any:
        assert self._rows is not None
        return self._rows.read()

    @property
    def _listed(self) -> Sequence[Event]:
        return self.event.get("clients") or []

    def __len__(self) -> int:
        return len(self._listed) if self._rows is None else self._rows.count

    def __getitem__(self, place: int) -> Event:
        """A client's `name`, `samples`, `sequences`, `targets`, `top_k`, `tier_label`, as far as they are known."""
        if self._rows is None:
            return self._listed[place]
        found: Event = self._table.slice(place, 1).to_pylist()[0]
        return found

    def __iter__(self) -> Iterator[Event]:
        if self._rows is None:
            yield from self._listed
            return
        for batch in self._table.to_batches(2**14):
            yield from batch.to_pylist()

    @property
    def names(self) -> list[str]:
        """All names."""
        if self._rows is None:
            return [client["name"] for client in self._listed]
        names: list[str] = self._table["name"].to_pylist()
        return names

    @property
    def tiers(self) -> list[str]:
        """Every client's tier."""
        if self._rows is None:
            return [tier_of(client) for client in self._listed]
        tiers: list[str] = self._table["tier_label"].to_pylist()
        return tiers

    @property
    def tiers_present(self) -> set[str]:
        """The tiers that clients have."""
        return set(self.tiers) if self._rows is None else set(self._table["tier_label"].unique().to_pylist())

    @property
    def targets(self) -> list[int]:
        """Every client's training targets, 0 where nobody says."""
        if self._rows is None:
            return [formats.targets_of(client) or 0 for client in self._listed]
        known = "targets" in self._table.column_names
        return [count or 0 for count in self._table["targets"].to_pylist()] if known else [0] * len(self)

    @property
    def labels(self) -> list[str]:
        """Names of the labels or groups of the samples."""
        return [str(name) for name in (self.event.get("distribution") or {}).get("labels") or []]

    @cached_property
    def _counts(self) -> Any:
        """Samples by client and label, [clients][labels]; empty where they are not recorded."""
        if self._rows is None:
            return (self.event.get("distribution") or {}).get("counts") or []
        if "counts" not in self._table.column_names:
            return []
        flat = self._table["counts"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        if len(flat) != len(self) * len(self.labels):
            path = self._rows.path
            raise UserError(f"{path}: column counts: needs one number per label ({len(self.labels)}) in every row; {MENDED}")
        return np.reshape(flat, (len(self), len(self.labels)))

    def counts_of(self, place: int) -> list[int]:
        """A client's samples by label; none where they are not recorded."""
        return [int(count) for count in self._counts[place]] if len(self._counts) == len(self) else []

    @property
    def label_totals(self) -> list[int]:
        """Samples by label."""
        if isinstance(self._counts, np.ndarray):
            totals: list[int] = self._counts.sum(axis=0).tolist()
            return totals
        return [sum(row[label] for row in self._counts) for label in range(len(self.labels))]

    @property
    def mix_labels(self) -> bool:
        """Whether samples by label are recorded, and some client has samples of several."""
        if isinstance(self._counts, np.ndarray):
            return bool(((self._counts > 0).sum(axis=1) > 1).any())
        return len(self._counts) == len(self) and any(sum(1 for n in row if n) > 1 for row in self._counts)

    @property
    def omissions(self) -> Event | None:
        """What was left out or cut, as in the event; None where nobody counted."""
        counted: Event | None = self.event.get("omissions")
        if self._rows is None or not counted:
            return counted
        clients: dict[str, dict[str, int]] = {}
        for name in (name for name in self._table.column_names if name.startswith(OMITTED)):
            column = self._table.select(["name", name])
            for row in column.filter(column[name].is_valid()).to_pylist():
                clients.setdefault(row["name"], {})[name.removeprefix(OMITTED)] = row[name]
        return {**counted, "clients": clients}
