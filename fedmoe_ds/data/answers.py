"""Answers: a sample as task metrics see it: a prompt, and the reference answer that is expected after it.

The answer is the last run of targets: what follows `### Response:`, the words of a label, the last assistant turn of a
conversation. It ends with the tokenizer's end-of-text token, or with the special token at its end (a chat template's end of
turn). An answer without either, because the prompt's format writes none or because it was cut, ends where it ends: nothing is
expected after it.

Legend: S positions of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from fedmoe_ds.data.encoder import special_tokens
from fedmoe_ds.data.sequences import Sequences
from fedmoe_ds.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MOST_CHOICES = 64
"""Different answers that a sample is ranked against: each costs a pass over the whole hold-out."""


class AnswerData(Protocol):
    """Samples by owner, as `fedmoe_ds.data.FederatedData` has them: what an evaluation reads, and where candidates are from."""

    @property
    def sequence_length(self) -> int: ...

    def __len__(self) -> int: ...

    def train(self, client: int) -> Sequences: ...

    def holdout(self, client: int) -> Sequences: ...

    def global_holdout(self) -> Sequences: ...


@dataclass(frozen=True)
class Answer:
    """Where the answer of a sequence stands, `start` to `stop`; its tokens, and those that end a generated one."""

    start: int
    stop: int
    tokens: tuple[int, ...]
    ends: frozenset[int]


@dataclass(frozen=True)
class AnswerReader:
    """Finds the answers of sequences; `end` is the end-of-text token, `special` are all special tokens."""

    end: int
    special: frozenset[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> AnswerReader:
        """For sequences that this tokenizer has encoded."""
        assert tokenizer.eos_token_id is not None, "the encoder has refused a tokenizer without an end-of-text token"
        return cls(int(tokenizer.eos_token_id), frozenset(special_tokens(tokenizer)))

    def __call__(self, ids_S: NDArray[np.int64], mask_S: NDArray[np.bool_]) -> Answer:
        """The answer of a sequence with at least one target."""
        targets = np.flatnonzero(mask_S)
        # A gap between targets is a prompt: another turn of the user.
        gaps = np.flatnonzero(np.diff(targets) > 1)
        start, stop = int(targets[gaps[-1] + 1] if len(gaps) else targets[0]), int(targets[-1]) + 1
        ends = {self.end, int(ids_S[stop - 1])} & (self.special | {self.end})
        # Decoding stops at the first of them; a template may have targets after it, such as a line break.
        ended = np.flatnonzero(np.isin(ids_S[start:stop], sorted(ends)))
        stop = start + int(ended[0]) + 1 if len(ended) else stop
        return Answer(start, stop, tuple(int(token) for token in ids_S[start:stop]), frozenset(ends))

    def each(self, part: Sequences) -> list[Answer]:
        """The answer of every sequence."""
        return [self(ids, mask) for ids, mask in zip(part.input_ids, part.loss_mask, strict=True)]

    def asked(self, part: Sequences, tokens: Sequence[int]) -> Sequences:
        """The same prompts, each followed by `tokens` in place of its own answer; these alone are targets."""
        ids, masks = [], []
        for own, answer in zip(part.input_ids, self.each(part), strict=True):
            ids.append(np.concatenate([own[: answer.start], np.asarray(tokens, dtype=np.int64)]))
            masks.append(np.arange(len(ids[-1])) >= answer.start)
        return Sequences(ids, masks)


def check_prompts(part: Sequences, key: str) -> None:
    """Raise UserError where samples have no prompt before their answer: `key` asks for a metric that needs one."""
    # Position 0 is never a target, so the targets of a document begin at 1.
    if any(int(np.argmax(mask)) <= 1 for mask in part.loss_mask):
        raise no_prompt(key)


def no_prompt(key: str) -> UserError:
    """The line for samples that are documents."""
    return UserError(
        f"{key}: samples of data.template=text are documents: nothing is asked, so no answer can be right; use another "
        "template, or drop the key"
    )


def choices(data: AnswerData, reader: AnswerReader) -> list[tuple[int, ...]]:
    """All different answers in the data, hold-outs included, in sorted order: the candidates of a ranked choice.

    Raises:
        UserError: there are more than `MOST_CHOICES`, or fewer than two.
    """
    found: set[tuple[int, ...]] = set()
    for part in _owners(data):
        found.update(reader(ids, mask).tokens for ids, mask in zip(part.input_ids, part.loss_mask, strict=True))
        # Open answers are noticed in the first clients: the others need not be read.
        if len(found) > MOST_CHOICES:
            break
    if not 2 <= len(found) <= MOST_CHOICES:
        count = f"more than {MOST_CHOICES}" if found and len(found) > 1 else str(len(found))
        raise UserError(
            f"evaluation.metrics: ranked_choice: the data have {count} different answers, and it needs 2 to {MOST_CHOICES} for "
            "all clients together, such as the labels of data.template=classification; use exact_match"
        )
    return sorted(found)


def _owners(data: AnswerData) -> Iterator[Sequences]:
    clients = range(len(data))
    return chain((data.global_holdout(),), (part(client) for client in clients for part in (data.train, data.holdout)))
