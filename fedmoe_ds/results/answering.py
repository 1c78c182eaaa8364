"""Answering: what a run's model says to prompts, by the layers of training and the run's own template."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedmoe_ds.data.encoder import Encoder
from fedmoe_ds.data.templates.question import RAW, Question, chat_reading, question
from fedmoe_ds.data.templates.reading import Reading
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation.generation import continued, likeliest
from fedmoe_ds.foundation.context_length import longest_sequence
from fedmoe_ds.randomness import torch_generator
from fedmoe_ds.results.loaded_model import LoadedModel, Note
from fedmoe_ds.results.trained_run import TrainedRun, open_run


@dataclass(frozen=True)
class Answer:
    """Of one model to one prompt; `ended`: by itself, within the tokens and positions that there were."""

    text: str
    ended: bool


@dataclass(frozen=True)
class Inquiry:
    """What is asked of whom.

    Attributes:
        way: `own` (the prompt is written as the run's data were), `chat` or `raw`.
        most: tokens of an answer.
        temperature: of the draws; 0: the likeliest token.
        before: ask the foundation as well.
    """

    prompts: Sequence[str]
    tier: str | None = None
    client: str | None = None
    way: str = "own"
    most: int = 64
    temperature: float = 0.0
    seed: int = 0
    before: bool = False


def ask(path: Path, round_index: int | str | None, model: Path | None, inquiry: Inquiry, note: Note) -> dict[str, list[Answer]]:
    """The answers to all prompts, by the name of the model: of the foundation, where it is asked, and of the run.

    Raises:
        UserError: there is no such run, round, tier or client; it classifies images; or a prompt leaves no position.
    """
    run = open_run(path, round_index, model)
    if run.spec.images is not None:
        raise UserError(f"run: {path}: its model classifies images, and writes no text; `fedmoe evaluate` scores it")
    chosen = run.select(inquiry.tier, inquiry.client)  # before any weight is loaded
    loaded = LoadedModel.of_run(run, before=inquiry.before)
    encoder = Encoder(loaded.foundation.tokenizer, own_code=loaded.foundation.code is not None)
    reading = _reading(inquiry.way, run, encoder)
    asked = [question(words, reading, encoder) for words in inquiry.prompts]
    _check_room(asked, loaded)
    name = f"round {run.round}, {chosen.client.name if chosen.client is not None else f'k={chosen.tier}'}"
    note(f"{name}; prompt as {reading['template']}")
    answers = {}
    if inquiry.before:
        answers["foundation"] = _answered(loaded, asked, inquiry)
        loaded.restore()
    return {**answers, name: _answered(loaded, asked, inquiry)}


def _reading(way: str, run: TrainedRun, encoder: Encoder) -> Reading:
    """How the prompts become tokens; `own`: as the run's rows did, by its record. Raises UserError where it does not say."""
    if way == "raw":
        return RAW
    event = next((event for event in run.events if event["event"] == "data"), {})
    found: Reading | None = event.get("reading")
    if way == "chat":
        return chat_reading(found or {}, encoder)
    if found is None:
        raise UserError(f"run: {run.folder}: its record does not say how its data were read; add --raw or --chat")
    return found


def _check_room(asked: list[Question], loaded: LoadedModel) -> None:
    longest = longest_sequence(loaded.foundation.model.config)
    for place, one in enumerate(asked, start=1):
        if longest is not None and len(one.ids) >= longest:
            raise UserError(
                f"--prompt: number {place} has {len(one.ids)} tokens, and the model has {longest} positions; shorten it"
            )


def _answered(loaded: LoadedModel, asked: list[Question], inquiry: Inquiry) -> list[Answer]:
    """Each by itself: none depends on what else is asked."""
    longest, tokenizer = longest_sequence(loaded.foundation.model.config), loaded.foundation.tokenizer
    found = []
    with loaded.serving(inquiry.tier, inquiry.client) as forward:
        for place, (ids, ends) in enumerate(asked):
            choose = drawn(inquiry.temperature, inquiry.seed, place) if inquiry.temperature else likeliest
            (tokens,) = continued([ids], [ends], inquiry.most, longest, forward, bool, choose)
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            found.append(Answer(text, bool(tokens) and tokens[-1] in ends))
    return found


def drawn(temperature: float, seed: int, place: int) -> Callable[[Tensor], list[int]]:
    """Draws from the softmax of logits / temperature; every prompt has draws of its own."""
    generator = torch_generator(seed, "answer", place)

    def choose(logits_NV: Tensor) -> list[int]:
        shares_NV = torch.softmax(logits_NV.cpu().double() / temperature, dim=-1)
        tokens: list[int] = torch.multinomial(shares_NV, 1, generator=generator).squeeze(1).tolist()
        return tokens

    return choose
