"""Samples: encoded rows with their targets, and documents cut into sequences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedmoe_ds.data.table import Column

BATCH = 512


@dataclass(frozen=True)
class Samples:
    """Encoded rows, in row order.

    `tokens[i]` int64 [length], `loss_mask[i]` bool [length], True at targets, `rows[i]` the row it came from. `omissions`
    holds (row, kind) of every row that is left out, cut, or told for another reason. The prompt of a sample, to which an answer
    is generated, is `tokens[i]` up to the first token of the last run of targets.
    """

    tokens: list[NDArray[np.int64]]
    loss_mask: list[NDArray[np.bool_]]
    rows: list[int]
    omissions: list[tuple[int, str]]

    def add(self, row: int, tokens: NDArray[np.int64], loss_mask: NDArray[np.bool_]) -> None:
        """Take the sample of one row."""
        self.tokens.append(tokens)
        self.loss_mask.append(loss_mask)
        self.rows.append(row)


class Pieces(NamedTuple):
    """Prompt ids and answer ids of a row; whether it holds nothing to learn, lost its end, or names a special token."""

    prompt: list[int]
    answer: list[int]
    empty: bool = False
    cut: bool = False
    named: bool = False


def pack(documents: Sequence[NDArray[np.int64]], sequence_length: int) -> list[NDArray[np.int64]]:
    """Concatenate and cut into sequences of `sequence_length` tokens; the last has 2 or more tokens or is left out."""
    # Every document ends with its end-of-text token, so a sequence may hold several of them.
    stream = np.concatenate(documents)
    chunks = [stream[start : start + sequence_length] for start in range(0, len(stream), sequence_length)]
    return chunks if len(chunks[-1]) >= 2 else chunks[:-1]


def all_but_first(tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return the loss mask of a packed sequence."""
    mask = np.ones(len(tokens), dtype=np.bool_)
    mask[0] = False
    return mask


def batches(column: Column) -> Iterator[list[str]]:
    """Yield the strings of one column, `BATCH` at a time, a missing value as ""."""
    values = iter(column)
    while batch := [value or "" for value in islice(values, BATCH)]:
        yield batch
