"""Generate: what a run's model answers, at any budget tier, round or client.

    python launch/generate.py RUN --prompt "How do I boil an egg?" [--before] [--tier K] [--client NAME] [--round N]

The prompt is written as the run's own data were (its prompt or its chat template); --raw goes on from the words as they are.
Greedy decoding unless --temperature is given. Answers go to standard output, one after the other with an empty line between
them; what is to be told about them goes to standard error. There is no cache of keys and values: every token takes a pass over
all that stands before it.
"""

from __future__ import annotations

import argparse
import math
import sys
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
from fedmoe_ds.results.loaded_model import LoadedModel
from fedmoe_ds.results.trained_run import TrainedRun, open_run, round_choice
from fedmoe_ds.terminal import note, show


@dataclass(frozen=True)
class Answer:
    """Of one model to one prompt; `ended`: by itself, within the tokens and positions that there were."""

    text: str
    ended: bool


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, or one of its checkpoints")
    parser.add_argument("--prompt", action="append", required=True, metavar="TEXT", help="'-' reads it from standard input")
    parser.add_argument("--before", action="store_true", help="the foundation's answer as well")
    parser.add_argument("--tier", metavar="K", help="the model of this budget tier (default: the largest)")
    parser.add_argument("--client", metavar="NAME", help="the model that this client has")
    parser.add_argument("--round", type=round_choice, metavar="N", help="of the checkpoint, or best (default: the newest)")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="longest answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="draw tokens (default: the likeliest)")
    parser.add_argument("--seed", type=int, metavar="N", help="of the draws (default: 0)")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="the base model, where it has moved")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--chat", action="store_true", help="as a user's turn, whatever the run's data were")
    how.add_argument("--raw", action="store_true", help="go on from the words as they are")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Raises UserError, one line each, for what the user can fix."""
    args = parser().parse_args(argv)
    _check(args)
    prompts = [_read(text) for text in _once(args.prompt)]
    run = open_run(args.run, args.round, args.model)
    if run.spec.images is not None:
        raise UserError(f"run: {args.run}: its model classifies images, and writes no text; launch/evaluate.py scores it")
    chosen = run.select(args.tier, args.client)  # before any weight is loaded
    loaded = LoadedModel.of_run(run, before=args.before)
    encoder = Encoder(loaded.foundation.tokenizer, own_code=loaded.foundation.code is not None)
    reading = RAW if args.raw else chat_reading(reading_of(run), encoder) if args.chat else reading_of(run)
    asked = [question(words, reading, encoder) for words in prompts]
    _check_room(asked, loaded)
    whose = chosen.client.name if chosen.client is not None else f"k={chosen.tier}"
    note(f"round {run.round}, {whose}; prompt as {'text' if reading is RAW else reading['template']}")
    answers = {}
    if args.before:
        answers["foundation"] = answered(loaded, asked, args)
        loaded.restore()
    answers[f"round {run.round}, {whose}"] = answered(loaded, asked, args)
    show("\n\n".join(_labelled(prompts, answers) if args.before else [answer.text for answer in next(iter(answers.values()))]))
    for label, found in answers.items():
        for place, answer in enumerate(found, start=1):
            if not answer.ended:
                note(
                    f"{label}: the answer to prompt {place} was cut after {args.max_new_tokens} tokens, or where positions end"
                )
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens: {args.max_new_tokens}: must be 1 or more")
    if not (math.isfinite(args.temperature) and args.temperature >= 0):
        raise UserError(f"--temperature: {args.temperature}: must be 0 (the likeliest token) or more")
    if args.seed is not None and not args.temperature:
        raise UserError(f"--seed: {args.seed}: greedy decoding draws nothing; drop it, or give a --temperature above 0")


def _once(prompts: list[str]) -> list[str]:
    if prompts.count("-") > 1:
        raise UserError("--prompt: -: standard input can be read once; give one prompt from there")
    return prompts


def _read(text: str) -> str:
    words = sys.stdin.read().removesuffix("\n") if text == "-" else text
    if not words.strip():
        raise UserError("--prompt: is empty; write what the model is to answer")
    return words


def reading_of(run: TrainedRun) -> Reading:
    """How the run's rows became tokens, as its record says. Raises UserError where it does not."""
    event = next((event for event in run.events if event["event"] == "data"), {})
    found: Reading | None = event.get("reading")
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


def answered(loaded: LoadedModel, asked: list[Question], args: argparse.Namespace) -> list[Answer]:
    """The answers of the model that is chosen, each by itself: none depends on what else is asked."""
    longest, tokenizer = longest_sequence(loaded.foundation.model.config), loaded.foundation.tokenizer
    found = []
    with loaded.serving(args.tier, args.client) as forward:
        for place, (ids, ends) in enumerate(asked):
            choose = drawn(args.temperature, args.seed or 0, place) if args.temperature else likeliest
            (tokens,) = continued([ids], [ends], args.max_new_tokens, longest, forward, bool, choose)
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


def _labelled(prompts: list[str], answers: dict[str, list[Answer]]) -> list[str]:
    """A block for each prompt: it, and the answer of each model, under their names."""
    blocks = []
    for place, words in enumerate(prompts):
        named = [f"[{label}]\n{found[place].text}" for label, found in answers.items()]
        blocks.append("\n".join([f"[prompt {place + 1}]\n{words}", *named]))
    return blocks
