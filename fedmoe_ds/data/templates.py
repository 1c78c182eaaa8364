"""How a row becomes tokens, and which of the tokens count as targets.

* `text`: a document; every token but the first of a sequence is a target.
* `instruction`: a prompt and an answer; the answer and the end-of-text token are targets.
* `classification`: a text and the words of its label; the words and the end-of-text token are targets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedmoe_ds.config.tree import DataConfig
from fedmoe_ds.errors import UserError, nearest

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

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
# A missing answer drops its row, with a count: published instruction sets do have a few.
NULLABLE = OPTIONAL | {"output"}


@dataclass(frozen=True)
class Samples:
    """Encoded rows, in row order.

    `tokens[i]` int64 [length], `targets[i]` bool [length], `rows[i]` the row it came from. `dropped` counts rows that
    gave nothing to learn: empty documents, missing answers, answers cut away entirely by `data.sequence_length`.
    """

    tokens: list[NDArray[np.int64]]
    targets: list[NDArray[np.bool_]]
    rows: list[int]
    dropped: int


class Encoder:
    """A tokenizer that adds no special token on its own, and the special tokens we add."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"foundation.path: {tokenizer.name_or_path}: its tokenizer has no end-of-text token; "
                "set eos_token in its tokenizer_config.json"
            )
        self._tokenizer = tokenizer
        self.end = [int(tokenizer.eos_token_id)]
        # Models that were trained with a leading token (Mixtral's <s>) are given it, the others are not.
        bos = tokenizer.bos_token_id
        self.start = [int(bos)] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []

    def __call__(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text."""
        ids: list[list[int]] = self._tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )["input_ids"]
        return ids


def resolve_columns(table: Dataset, config: DataConfig) -> dict[str, str]:
    """Return template field -> column, from `data.columns` first and from the well-known names otherwise."""
    fields = FIELDS[config.template]
    present = table.column_names
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


def label_words(table: Dataset, column: str, names: list[str]) -> list[str]:
    """Return the words of every row's label.

    Integer labels are looked up in `names` (`data.label_names`) or in the column's own ClassLabel feature. String
    labels are their own words, and must be among `names` where those are given.
    """
    names = names or list(getattr(table.features[column], "names", None) or [])
    return [_words(value, names, column, row) for row, value in enumerate(table[column][:])]


def _words(value: Any, names: list[str], column: str, row: int) -> str:
    where = f"data.label_names: row {row + 1}, column '{column}': label {value!r}"
    if isinstance(value, str):
        if names and value not in names:
            raise UserError(f"{where}: not among the label names {', '.join(names)}; complete data.label_names")
        if not value.strip():
            raise UserError(f"{where}: is empty; mend or drop the row")
        return value.strip()
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{where}: neither an integer nor a word; mend or drop the row")
    if not names:
        raise UserError(f"{where}: an integer without words; name the labels in data.label_names")
    if not 0 <= value < len(names):
        raise UserError(f"{where}: outside 0..{len(names) - 1}; complete data.label_names or drop the row")
    return names[value]


def check_rows(table: Dataset, columns: dict[str, str], config: DataConfig) -> None:
    """Raise a UserError that names the first row whose fields are not what the template needs."""
    for field, column in columns.items():
        if field == "label":
            label_words(table, column, config.label_names)
            continue
        for row, value in enumerate(table[column][:]):
            if isinstance(value, str) or (value is None and field in NULLABLE):
                continue
            what = "is missing" if value is None else f"holds {value!r:.40}, not text"
            raise UserError(
                f"data.columns.{field}: row {row + 1}: column '{column}' {what}; mend the row or map another column"
            )


def encode(table: Dataset, columns: dict[str, str], config: DataConfig, encoder: Encoder) -> Samples:
    """Return the encoded rows of `table`; a text row is a whole document, any other row is one finished sequence."""
    encoded = Samples([], [], [], 0)
    dropped = 0
    for row, pieces in enumerate(_ENCODERS[config.template](table, columns, config, encoder)):
        if pieces is None:
            dropped += 1
            continue
        prompt, answer = pieces
        ids = np.array(prompt + answer, dtype=np.int64)
        targets = np.zeros(len(ids), dtype=np.bool_)
        targets[max(len(prompt), 1) :] = True
        if config.template != "text":
            ids, targets = ids[: config.sequence_length], targets[: config.sequence_length]
        if not targets.any():
            dropped += 1
            continue
        encoded.tokens.append(ids)
        encoded.targets.append(targets)
        encoded.rows.append(row)
    return Samples(encoded.tokens, encoded.targets, encoded.rows, dropped)


def pack(documents: Sequence[NDArray[np.int64]], sequence_length: int) -> list[NDArray[np.int64]]:
    """Concatenate and cut into sequences of `sequence_length` tokens; the last has 2 or more tokens or is left out."""
    stream = np.concatenate(documents)
    chunks = [stream[start : start + sequence_length] for start in range(0, len(stream), sequence_length)]
    return chunks if len(chunks[-1]) >= 2 else chunks[:-1]


def all_but_first(tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return the targets of a packed sequence."""
    targets = np.ones(len(tokens), dtype=np.bool_)
    targets[0] = False
    return targets


# Prompt ids and answer ids of a row, or None where the row holds nothing to learn.
Pieces = tuple[list[int], list[int]] | None


def _documents(table: Dataset, columns: dict[str, str], config: DataConfig, encoder: Encoder) -> Iterator[Pieces]:
    for texts in _batches(table, columns["text"]):
        for text, ids in zip(texts, encoder(texts), strict=True):
            yield (encoder.start, ids + encoder.end) if text.strip() else None


def _instructions(table: Dataset, columns: dict[str, str], config: DataConfig, encoder: Encoder) -> Iterator[Pieces]:
    instructions = _batches(table, columns["instruction"])
    inputs = _batches(table, columns["input"]) if "input" in columns else None
    for batch, answers in zip(instructions, _batches(table, columns["output"]), strict=True):
        extra = next(inputs) if inputs is not None else [""] * len(batch)
        prompts = encoder([_prompt(*pair) for pair in zip(batch, extra, strict=True)])
        for prompt, text, answer in zip(prompts, answers, encoder(answers), strict=True):
            yield (encoder.start + prompt, answer + encoder.end) if text.strip() else None


def _prompt(instruction: str, extra: str) -> str:
    middle = f"\n\n### Input:\n{extra}" if extra.strip() else ""
    return f"### Instruction:\n{instruction}{middle}\n\n### Response:\n"


def _classes(table: Dataset, columns: dict[str, str], config: DataConfig, encoder: Encoder) -> Iterator[Pieces]:
    words = label_words(table, columns["label"], config.label_names)
    vocabulary = sorted(set(words))
    answers = dict(zip(vocabulary, encoder([f" {word}" for word in vocabulary]), strict=True))
    (question,) = encoder(["\nLabel:"])
    row = 0
    for texts in _batches(table, columns["text"]):
        for ids in encoder(texts):
            answer = answers[words[row]] + encoder.end
            # The text gives way, not the label: a long article is still a sample.
            room = max(config.sequence_length - len(encoder.start) - len(question) - len(answer), 0)
            yield encoder.start + ids[:room] + question, answer
            row += 1


_ENCODERS: dict[str, Callable[[Dataset, dict[str, str], DataConfig, Encoder], Iterator[Pieces]]] = {
    "text": _documents,
    "instruction": _instructions,
    "classification": _classes,
}


def _batches(table: Dataset, column: str) -> Iterator[list[str]]:
    """Yield the strings of one column, `BATCH` at a time, a missing value as ""."""
    for start in range(0, len(table), BATCH):
        yield [value or "" for value in table[column][start : start + BATCH]]
