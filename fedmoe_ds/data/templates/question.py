"""Question: what somebody asks a trained model, as the tokens that its run's template puts before an answer.

The reading of a run (`reading.py`) says how: the prompt's pieces, the chat template, or nothing. What a user writes is text:
the name of a special token in it is no special token.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedmoe_ds.config.data_section import DataConfig
from fedmoe_ds.config.prompt import Prompt
from fedmoe_ds.data.encoder import Encoder
from fedmoe_ds.data.templates.chat import encode_question
from fedmoe_ds.data.templates.chat_template import RefusedError, UnmarkedError, chat_template, named_template
from fedmoe_ds.data.templates.classification import QUESTION
from fedmoe_ds.data.templates.reading import Reading
from fedmoe_ds.errors import UserError

RAW: Reading = {"template": "text"}
"""The words as they are: the model goes on from them."""


class Question(NamedTuple):
    """Ids int64 [S] to go on from, and the tokens that end an answer."""

    ids: NDArray[np.int64]
    ends: frozenset[int]


def chat_reading(reading: Reading, encoder: Encoder) -> Reading:
    """The same run asked by a chat template: its own where it has read chats, else the tokenizer's, or ChatML."""
    if "chat_template" in reading:
        return reading
    template = chat_template(DataConfig(), encoder.tokenizer, bool(encoder.start))
    return {"template": "chat", "chat_template": {"origin": template.origin, "text": template.text}}


def question(words: str, reading: Reading, encoder: Encoder) -> Question:
    """Encode what a user asks.

    Raises:
        UserError: the chat template refuses it, or the reading is of no template that is known here.
    """
    end = frozenset(encoder.end)
    if reading.get("template") == "chat":
        return _chat(words, reading, encoder)
    if reading.get("template") == "instruction":
        return Question(_ids(encoder, _prompt(reading, words)), end)
    if reading.get("template") == "classification":
        # Encoded apart, as in training: the text is what may be cut there.
        (text, _), (asked, _) = encoder([words, QUESTION])
        return Question(np.array([*encoder.start, *text, *asked], dtype=np.int64), end)
    if reading.get("template") == "text":
        return Question(_ids(encoder, words), end)
    raise UserError(f"metrics.jsonl: data: reading: template {reading.get('template')}: not known here; use --raw or --chat")


def _ids(encoder: Encoder, text: str) -> NDArray[np.int64]:
    ((ids, _),) = encoder([text])
    return np.array([*encoder.start, *ids], dtype=np.int64)


def _prompt(reading: Reading, words: str) -> str:
    """The words in the place of the instruction, or of the input where that is all that a prompt has."""
    try:
        prompt = Prompt(**reading["prompt"])
    except (LookupError, TypeError) as error:
        raise UserError(f"metrics.jsonl: data: reading: prompt: {error}; use --raw, or the record of this version") from None
    return prompt.question("", words) if prompt.input == "only" else prompt.question(words, "")


def _chat(words: str, reading: Reading, encoder: Encoder) -> Question:
    written = reading["chat_template"]
    template = named_template(str(written["text"]), str(written["origin"]), encoder.tokenizer)
    try:
        ids, ends = encode_question(words, template, encoder)
    except RefusedError as refused:
        raise UserError(
            f"--prompt: the run's chat template refuses it: {refused}; write another prompt, or use --raw"
        ) from None
    except UnmarkedError:
        raise UserError(
            "--prompt: it holds the name of a special token, which the run's chat template does not keep apart from its own; "
            "leave it out, or use --raw"
        ) from None
    return Question(np.array(ids, dtype=np.int64), frozenset({*encoder.end, *ends}))
