"""How a row becomes tokens, and which of the tokens count as targets.

* `text`: a document; every token but the first of a sequence is a target. Documents are packed into sequences; nothing is cut
  off but a last token that would stand alone.
* `instruction`: a prompt and an answer; the answer and the end-of-text token are targets. The prompt is kept whole. An answer
  that is too long loses its end, and the end-of-text token with it, because the answer does not end there.
* `classification`: a text and the words of its label; the words and the end-of-text token are targets. A text that is too long
  loses its end; question, label and end-of-text token are kept whole.

What is left out or cut is counted (`omissions`): an empty text or answer, a prompt or a label that leaves no room.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedmoe_ds.config.schema import DataConfig
from fedmoe_ds.data.encoder import Encoded, Encoder
from fedmoe_ds.data.omissions import CUT, EMPTY, NAMED, NO_ROOM
from fedmoe_ds.data.progress import counted
from fedmoe_ds.data.table import Column, Table
from fedmoe_ds.errors import UserError, nearest

BATCH = 512
# Template field -> the column names it is known by. Alpaca and AlpaGasus say input/output, Dolly context/response.
FIELDS: dict[str, dict[str, tuple[str, ...]]] = {
    "text": {"text": ("text",)},
    "instruction": {
        "instruction": ("instruction",),
        "input": ("input", "context"),
        "output": ("output", "response"),
    },
    "classification": {"text": ("text",), "label": ("label",)},
}
OPTIONAL = frozenset({"input"})
INTEGER = re.compile("0|[1-9][0-9]{0,8}")
# A missing answer drops its row, with a count: published instruction sets do have a few.
NULLABLE = OPTIONAL | {"output"}


@dataclass(frozen=True)
class Samples:
    """Encoded rows, in row order.

    `tokens[i]` int64 [length], `loss_mask[i]` bool [length], True at targets, `rows[i]` the row it came from. `omissions`
    holds (row, kind) of every row that is left out, cut, or told for another reason.
    """

    tokens: list[NDArray[np.int64]]
    loss_mask: list[NDArray[np.bool_]]
    rows: list[int]
    omissions: list[tuple[int, str]]


def candidates(config: DataConfig) -> set[str]:
    """Return the names of all columns that `resolve_columns` might choose, whatever the source has."""
    known = {name for names in FIELDS[config.template].values() for name in names}
    return known | set(config.columns.values())


def resolve_columns(table: Table, config: DataConfig) -> dict[str, str]:
    """Return template field -> column, from `data.columns` first and from the well-known names otherwise."""
    fields = FIELDS[config.template]
    present = table.names
    # data.columns may use either name of a field: `context` is Dolly's word for `input`.
    aliases = {alias: field for field, names in fields.items() for alias in names}
    given: dict[str, str] = {}
    for key, column in config.columns.items():
        if key not in aliases:
            raise UserError(f"data.columns: {key}: no field of template '{config.template}'{nearest(key, aliases)}")
        require_column(column, present, f"data.columns.{key}")
        given[aliases[key]] = column
    for field, names in fields.items():
        known = [name for name in names if name in present]
        if field in given or (not known and field in OPTIONAL):
            continue
        if not known:
            raise UserError(
                f"data.columns: {' or '.join(names)}: no such column for template '{config.template}'; "
                f"present: {', '.join(present)}; map it with data.columns.{field}=<column>"
            )
        given[field] = known[0]
    return given


def require_column(column: str, present: list[str], where: str) -> None:
    """Raise a UserError unless the column exists."""
    if column not in present:
        raise UserError(f"{where}: {column}: no such column; present: {', '.join(present)}{nearest(column, present)}")


def label_words(table: Table, column: str, names: list[str]) -> list[str]:
    """Return the words of every row's label.

    Integer labels are looked up in `names` (`data.label_names`) or in the column's own ClassLabel feature. String labels are
    their own words, as they stand there. Where names are given, they must be among these, or be the digits of an integer
    label, because a CSV file has no other way to write one.
    """
    names = names or table.classes.get(column, [])
    return [_words(value, names, column, row) for row, value in enumerate(table[column])]


def _words(value: Any, names: list[str], column: str, row: int) -> str:
    where = f"data.label_names: row {row + 1}, column '{column}': label {value!r}"
    if isinstance(value, str):
        if not value.strip():
            raise UserError(f"{where}: is empty; mend or drop the row")
        if not names or value in names:
            return value.strip()
        if INTEGER.fullmatch(value) is None:
            raise UserError(f"{where}: not among the label names {', '.join(names)}; complete data.label_names")
        # A column of a CSV file: all of its values are text.
        value = int(value)
    # A bool is an int in Python, and no class number.
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{where}: neither an integer nor a word; mend or drop the row")
    if not names:
        raise UserError(f"{where}: an integer without words; name the labels in data.label_names")
    if not 0 <= value < len(names):
        raise UserError(f"{where}: outside 0..{len(names) - 1}; complete data.label_names or drop the row")
    return names[value]


def check_rows(table: Table, columns: dict[str, str], config: DataConfig) -> None:
    """Raise a UserError that names the first row whose fields are not what the template needs."""
    for field, column in columns.items():
        if field == "label":
            label_words(table, column, config.label_names)
            continue
        for row, value in enumerate(table[column]):
            if isinstance(value, str) or (value is None and field in NULLABLE):
                continue
            what = "is missing" if value is None else f"holds {value!r:.40}, not text"
            raise UserError(
                f"data.columns.{field}: row {row + 1}: column '{column}' {what}; mend the row or map another column"
            )


def encode(table: Table, columns: dict[str, str], config: DataConfig, encoder: Encoder) -> Samples:
    """Return the encoded rows of `table`; a text row is a whole document, any other row is one finished sequence."""
    encoded = Samples([], [], [], [])
    encoders = _ENCODERS[config.template](table, columns, config, encoder)
    for row, pieces in enumerate(counted(encoders, len(table), "samples tokenized")):
        if pieces.named:
            encoded.omissions.append((row, NAMED))
        ids = np.array(pieces.prompt + pieces.answer, dtype=np.int64)
        kept = len(ids) if config.template == "text" else config.sequence_length
        # The first token has nothing before it to be predicted from, also where there is no prompt.
        first = max(len(pieces.prompt), 1)
        # An answer may lose its end, a label may not: half of its words would be another label.
        needed = len(ids) if config.template == "classification" else first + 1
        if pieces.empty or needed > kept:
            empty = pieces.empty or config.template == "text"
            encoded.omissions.append((row, EMPTY if empty else NO_ROOM))
            continue
        if pieces.cut or len(ids) > kept:
            encoded.omissions.append((row, CUT))
        mask = np.zeros(min(len(ids), kept), dtype=np.bool_)
        mask[first:] = True
        encoded.tokens.append(ids[:kept])
        encoded.loss_mask.append(mask)
        encoded.rows.append(row)
    return encoded


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


class Pieces(NamedTuple):
    """Prompt ids and answer ids of a row; whether it holds nothing to learn, lost its end, or names a special token."""

    prompt: list[int]
    answer: list[int]
    empty: bool = False
    cut: bool = False
    named: bool = False


def _documents(table: Table, columns: dict[str, str], config: DataConfig, encoder: Encoder) -> Iterator[Pieces]:
    for texts in _batches(table[columns["text"]]):
        for text, (ids, named) in zip(texts, encoder(texts), strict=True):
            yield Pieces(encoder.start, ids + encoder.end, empty=not text.strip(), named=named)


def _instructions(table: Table, columns: dict[str, str], config: DataConfig, encoder: Encoder) -> Iterator[Pieces]:
    instructions = _batches(table[columns["instruction"]])
    inputs = _batches(table[columns["input"]]) if "input" in columns else None
    for batch, answers in zip(instructions, _batches(table[columns["output"]]), strict=True):
        # All three columns are batched alike, so the batches stay in step.
        extra = next(inputs) if inputs is not None else [""] * len(batch)
        prompts = encoder([_prompt(*pair) for pair in zip(batch, extra, strict=True)])
        for prompt, text, answer in zip(prompts, answers, encoder(answers), strict=True):
            named = prompt.named or answer.named
            yield Pieces(encoder.start + prompt.ids, answer.ids + encoder.end, empty=not text.strip(), named=named)


def _prompt(instruction: str, extra: str) -> str:
    middle = f"\n\n### Input:\n{extra}" if extra.strip() else ""
    return f"### Instruction:\n{instruction}{middle}\n\n### Response:\n"


def _classes(table: Table, columns: dict[str, str], config: DataConfig, encoder: Encoder) -> Iterator[Pieces]:
    words = label_words(table, columns["label"], config.label_names)
    vocabulary = sorted(set(words))
    # With the space before it: that is how the word is tokenised after "Label:".
    labels: dict[str, Encoded] = dict(zip(vocabulary, encoder([f" {word}" for word in vocabulary]), strict=True))
    ((question, _),) = encoder(["\nLabel:"])
    row = 0
    for texts in _batches(table[columns["text"]]):
        for ids, named in encoder(texts):
            label = labels[words[row]]
            answer = label.ids + encoder.end
            # The text is cut, not the label: a long article is still a sample.
            room = max(config.sequence_length - len(encoder.start) - len(question) - len(answer), 0)
            prompt = encoder.start + ids[:room] + question
            yield Pieces(prompt, answer, cut=len(ids) > room, named=named or label.named)
            row += 1


_ENCODERS: dict[str, Callable[[Table, dict[str, str], DataConfig, Encoder], Iterator[Pieces]]] = {
    "text": _documents,
    "instruction": _instructions,
    "classification": _classes,
}


def _batches(column: Column) -> Iterator[list[str]]:
    """Yield the strings of one column, `BATCH` at a time, a missing value as ""."""
    values = iter(column)
    while batch := [value or "" for value in islice(values, BATCH)]:
        yield batch
