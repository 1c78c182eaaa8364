"""Documents: plain text, whole; they are packed into sequences once their client is known."""

from __future__ import annotations

from collections.abc import Iterator

from fedmoe_ds.config.schema import DataConfig
from fedmoe_ds.data.encoder import Encoder
from fedmoe_ds.data.table import Table
from fedmoe_ds.data.templates.samples import Pieces, batches


def documents(table: Table, columns: dict[str, str], config: DataConfig, encoder: Encoder) -> Iterator[Pieces]:
    """Yield the pieces of every row."""
    for texts in batches(table[columns["text"]]):
        for text, (ids, named) in zip(texts, encoder(texts), strict=True):
            yield Pieces(encoder.start, ids + encoder.end, empty=not text.strip(), named=named)
