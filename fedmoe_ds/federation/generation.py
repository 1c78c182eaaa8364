"""Generation: greedy answers to the prompts of a few samples, for people who read the report.

There is no cache of keys and values: every token takes a whole pass over prompt and answer so far, through the layers that
train, with the caps and adapters of a tier. That suits a few samples and short answers. The shares of right answers need none
of it (`fedmoe_ds.federation.task_metrics`).

A pass has the samples that are not finished, as long as they are by then; nothing of that depends on the topology, and so the
answers do not either. Every rank of a cluster runs the same number of passes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedmoe_ds.data import Sequences
from fedmoe_ds.data.answers import Answer
from fedmoe_ds.federation.task_metrics import Forward

_ANY = 0
"""Stands at the place of the token that is asked for. Nothing before it looks at it, so any token will do."""


@dataclass(frozen=True)
class Generation:
    """The greedy answer to a sample of the global hold-out, as text.

    Attributes:
        tier, label: of the model; `client` where it is one client's own.
        exact: whether it is the reference, token by token, and ends as that does; None where it was cut before that was clear.
        ended: whether it came to an end by itself.
    """

    tier: int
    label: str
    sample: int
    prompt: str
    reference: str
    answer: str
    exact: bool | None
    ended: bool
    client: str | None = None


def as_text(
    part: Sequences, answers: Sequence[Answer], found: Sequence[Sequence[int]], tokenizer: Any, model: Mapping[str, Any]
) -> list[Generation]:
    """What people read; `model` are the fields that say whose answers these are. Special tokens are shown in prompts only."""
    rows = []
    for sample, (ids, answer, tokens) in enumerate(zip(part.input_ids, answers, found, strict=True)):
        row = {
            "prompt": tokenizer.decode(ids[: answer.start]),
            "reference": tokenizer.decode(answer.tokens, skip_special_tokens=True),
            "answer": tokenizer.decode(tokens, skip_special_tokens=True),
            "ended": bool(tokens) and tokens[-1] in answer.ends,
        }
        rows.append(Generation(sample=sample, exact=is_exact(tokens, answer), **row, **model))
    return rows


def greedy(
    part: Sequences,
    answers: Sequence[Answer],
    most: int,
    longest: int | None,
    forward: Forward,
    go_on: Callable[[bool], bool],
) -> list[list[int]]:
    """`continued` after the prompts of samples, by the likeliest token."""
    prompts = [ids[: answer.start] for ids, answer in zip(part.input_ids, answers, strict=True)]
    return continued(prompts, [answer.ends for answer in answers], most, longest, forward, go_on)


def likeliest(logits_NV: Tensor) -> list[int]:
    """The token that each row is for; of equal ones the first."""
    tokens: list[int] = logits_NV.argmax(-1).tolist()
    return tokens


def continued(
    prompts: Sequence[NDArray[np.int64]],
    ends: Sequence[Collection[int]],
    most: int,
    longest: int | None,
    forward: Forward,
    go_on: Callable[[bool], bool],
    choose: Callable[[Tensor], list[int]] = likeliest,
) -> list[list[int]]:
    """One token after each prompt, again and again, until one ends the answer; without prompts, only passes.

    Args:
        ends: tokens that end the answer to each prompt.
        most: tokens of an answer.
        longest: positions that the model has; None: no limit.
        go_on: whether any rank has an unfinished answer, this one as given. Collective.
        choose: the next token of every unfinished answer from its logits [N, V].
    Returns:
        Tokens of every answer, the one that ends it included.
    """
    texts: list[NDArray[np.int64]] = list(prompts)
    found: list[list[int]] = [[] for _ in texts]
    waiting = list(range(len(texts)))
    for _ in range(most):
        waiting = [i for i in waiting if longest is None or len(texts[i]) < longest]
        if not go_on(bool(waiting)):
            break
        result = forward([_asked([texts[i] for i in waiting])] if waiting else [])
        # One target per sample, in the order of the samples.
        for i, token in zip(waiting, choose(result.logits_NV), strict=True):
            found[i].append(token)
            texts[i] = np.append(texts[i], token)
        waiting = [i for i in waiting if found[i][-1] not in ends[i]]
    return found


def is_exact(found: Sequence[int], answer: Answer) -> bool | None:
    """Whether greedy decoding gives the reference, where it has come so far; a reference without an end may go on."""
    tokens, ended = tuple(found), bool(found) and found[-1] in answer.ends
    if not ended and len(tokens) < len(answer.tokens) and tokens == answer.tokens[: len(tokens)]:
        return None
    return tokens[: len(answer.tokens)] == answer.tokens


def _asked(texts: list[NDArray[np.int64]]) -> Sequences:
    masks = [np.arange(len(ids) + 1) == len(ids) for ids in texts]
    return Sequences([np.append(ids, _ANY) for ids in texts], masks)
