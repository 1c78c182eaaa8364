"""Classification: a text, a question, and the words of its label."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from fedmoe_ds.config.schema import DataConfig
from fedmoe_ds.data.encoder import Encoded, Encoder
from fedmoe_ds.data.table import Table
from fedmoe_ds.data.templates.samples import Pieces, batches
from fedmoe_ds.errors import UserError

INTEGER = re.compile("0|[1-9][0-9]{0,8}")
QUESTION = "\nLabel:"


def label_words(table: Table, column: str, names: list[str]) -> list[str]:
    """Return the words of every row's label.

    Integer labels are looked up in `names` (`data.label_names`) or in the column's own ClassLabel feature. String labels are
    their own words, as they stand there. Where names are given, they must be among these, or be the digits of an integer
    label, because a CSV file has no other way to write one.
    """
    names = names or table.classes.get(column, [])
    return [_words(value, names, column, table, row) for row, value in enumerate(table[column])]


def _words(value: Any, names: list[str], column: str, table: Table, row: int) -> str:
    # Words are looked up for every row, so the place is worked out for a bad one only.
    def where() -> str:
        return f"data.label_names: {table.place(row)}, column '{column}': label {value!r}"

    if isinstance(value, str):
        if not value.strip():
            raise UserError(f"{where()}: is empty; mend or drop the row")
        if not names or value in names:
            return value.strip()
        if INTEGER.fullmatch(value) is None:
            raise UserError(f"{where()}: not among the label names {', '.join(names)}; complete data.label_names")
        # A column of a CSV file: all of its values are text.
        value = int(value)
    # A bool is an int in Python, and no class number.
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{where()}: neither an integer nor a word; mend or drop the row")
    if not names:
        raise UserError(f"{where()}: an integer without words; name the labels in data.label_names")
    if not 0 <= value < len(names):
        raise UserError(f"{where()}: outside 0..{len(names) - 1}; complete data.label_names or drop the row")
    return names[value]


def classes(table: Table, columns: dict[str, str], config: DataConfig, encoder: Encoder) -> Iterator[Pieces]:
    """Yield the pieces of every row."""
    words = label_words(table, columns["label"], config.label_names)
    vocabulary = sorted(set(words))
    # With the space before it: that is how the word is tokenised after "Label:".
    labels: dict[str, Encoded] = dict(zip(vocabulary, encoder([f" {word}" for word in vocabulary]), strict=True))
    ((question, _),) = encoder([QUESTION])
    row = 0
    for texts in batches(table[columns["text"]]):
        for ids, named in encoder(texts):
            label = labels[words[row]]
            answer = label.ids + encoder.end
            # The text is cut, not the label: a long article is still a sample.
            room = max(config.sequence_length - len(encoder.start) - len(question) - len(answer), 0)
            prompt = encoder.start + ids[:room] + question
            yield Pieces(prompt, answer, cut=len(ids) > room, named=named or label.named)
            row += 1
