"""Generate: what a run's model answers, at any budget tier, round or client.

    fedmoe generate RUN --prompt "How do I boil an egg?" [--before] [--tier K] [--client NAME] [--round N]

The prompt is written as the run's own data were (its prompt or its chat template); --raw goes on from the words as they are.
Greedy decoding unless --temperature is given. Answers go to standard output, one after the other with an empty line between
them; what is to be told about them goes to standard error. There is no cache of keys and values: every token takes a pass over
all that stands before it.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedmoe_ds.errors import UserError
from fedmoe_ds.terminal import note, show

if TYPE_CHECKING:
    from fedmoe_ds.results.answering import Answer

BEST = "best"


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, or one of its checkpoints")
    parser.add_argument("--prompt", action="append", required=True, metavar="TEXT", help="'-' reads it from standard input")
    parser.add_argument("--before", action="store_true", help="the foundation's answer as well")
    parser.add_argument("--tier", metavar="K", help="the model of this budget tier (default: the largest)")
    parser.add_argument("--client", metavar="NAME", help="the model that this client has")
    parser.add_argument("--round", type=_round, metavar="N|best", help="of the checkpoint (default: the newest)")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="longest answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="draw tokens (default: the likeliest)")
    parser.add_argument("--seed", type=int, metavar="N", help="of the draws (default: 0)")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="the base model, where it has moved")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--chat", action="store_true", help="as a user's turn, whatever the run's data were")
    how.add_argument("--raw", action="store_true", help="go on from the words as they are")
    return parser


def _round(text: str) -> int | str:
    return text if text == BEST else int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Raises UserError, one line each, for what the user can fix."""
    args = parser().parse_args(argv)
    _check(args)
    prompts = [_read(text) for text in _once(args.prompt)]
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read by DeepSpeed when it is imported
    from fedmoe_ds.results.answering import Inquiry, ask

    way = "chat" if args.chat else "raw" if args.raw else "own"
    how = (args.tier, args.client, way, args.max_new_tokens, args.temperature, args.seed or 0, args.before)
    answers = ask(args.run, args.round, args.model, Inquiry(prompts, *how), note)
    show("\n\n".join(_labelled(prompts, answers) if args.before else [one.text for one in next(iter(answers.values()))]))
    for label, found in answers.items():
        for place, answer in enumerate(found, start=1):
            if not answer.ended:
                note(f"{label}: answer {place} is cut at {args.max_new_tokens} tokens, or at the model's last position")
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


def _labelled(prompts: list[str], answers: Mapping[str, list[Answer]]) -> list[str]:
    """A block for each prompt: it, and the answer of each model, under their names."""
    blocks = []
    for place, words in enumerate(prompts):
        named = [f"[{label}]\n{found[place].text}" for label, found in answers.items()]
        blocks.append("\n".join([f"[prompt {place + 1}]\n{words}", *named]))
    return blocks
