"""Source: rows with a content digest; and the standard library as one.

A source answers two questions: what is your content (a digest, so that prepared data can be found again without reading
the rows), and what are your rows (a `Table`, of the columns that are asked for).
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from fedmoe_ds.data import stdlib
from fedmoe_ds.data.table import Column, Table
from fedmoe_ds.errors import UserError


class Source(Protocol):
    """Rows with a content digest."""

    @property
    def group_column(self) -> str | None:
        """The column that says which group a row belongs to, where the source itself knows."""
        ...

    def digest(self) -> str:
        """Return a sha256 that changes when a row changes."""
        ...

    def table(self, wanted: Collection[str]) -> Table:
        """Return the rows, with those of the wanted columns that there are."""
        ...


@dataclass(frozen=True)
class StdlibSource:
    """The federated half of the standard library; columns group, name, text."""

    group_column: str | None = "group"

    @cached_property
    def _documents(self) -> list[stdlib.Document]:
        # Read once per process: the digest and the table need the same documents.
        return stdlib.split(stdlib.documents())[1]

    def digest(self) -> str:
        content = hashlib.sha256()
        for document in self._documents:
            for part in (document.group, document.name, document.text):
                # Every part is hashed on its own: moving a character from a name to a text must change the digest.
                content.update(hashlib.sha256(part.encode()).digest())
        return content.hexdigest()

    def table(self, wanted: Collection[str]) -> Table:
        names = ["group", "name", "text"]
        columns = {name: Column([[getattr(d, name) for d in self._documents]]) for name in names}
        return Table(names, columns, len(self._documents))


def with_rows(table: Table, key: str, name: str) -> Table:
    """Return the table. Raises UserError where it has no row."""
    if len(table) == 0:
        raise UserError(f"{key}: {name}: no rows; give data with at least two samples")
    return table
