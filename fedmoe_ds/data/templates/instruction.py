"""Instruction: a prompt (`data.prompt`) and an answer."""

from __future__ import annotations

from collections.abc import Iterator

from fedmoe_ds.config.prompt import PRESETS, Prompt
from fedmoe_ds.config.schema import DataConfig
from fedmoe_ds.data.encoder import Encoder
from fedmoe_ds.data.table import Table
from fedmoe_ds.data.templates.samples import Pieces, batches


def instructions(table: Table, columns: dict[str, str], config: DataConfig, encoder: Encoder) -> Iterator[Pieces]:
    """Yield the pieces of every row."""
    prompt = config.prompt.resolved()
    # The prompt of earlier versions keeps its tokens: its two halves are encoded apart.
    encode = _apart if prompt == PRESETS["plain"] else _joined
    outputs = batches(table[columns["output"]])
    blanks = ([""] * len(batch) for batch in batches(table[columns["output"]]))
    # All columns are batched alike, so the batches stay in step.
    instructions, extras = (batches(table[columns[field]]) if field in columns else None for field in ("instruction", "input"))
    for answers in outputs:
        blank = next(blanks)
        questions = [
            prompt.question(*pair)
            for pair in zip(
                next(instructions) if instructions is not None else blank,
                next(extras) if extras is not None else blank,
                strict=True,
            )
        ]
        for pieces, answer in zip(encode(questions, answers, prompt, encoder), answers, strict=True):
            yield pieces._replace(empty=not answer.strip())


def _apart(questions: list[str], answers: list[str], prompt: Prompt, encoder: Encoder) -> Iterator[Pieces]:
    end = encoder.end if prompt.end_of_text else []
    told = [prompt.answer_lead + answer for answer in answers]
    for question, answer in zip(encoder(questions), encoder(told), strict=True):
        yield Pieces(encoder.start + question.ids, answer.ids + end, named=question.named or answer.named)


def _joined(questions: list[str], answers: list[str], prompt: Prompt, encoder: Encoder) -> Iterator[Pieces]:
    """One text, as published code tokenises it: a tokenizer may write a word otherwise at the beginning of a text.

    Where a token would hold the end of the question and the beginning of the answer, both are encoded apart: at inference, too,
    the question is all that there is.
    """
    end = encoder.end if prompt.end_of_text else []
    told = [question + prompt.answer_lead + answer for question, answer in zip(questions, answers, strict=True)]
    for row, placed in enumerate(encoder.placed_as_text(told)):
        border = len(questions[row])
        count = sum(stop <= border for _, stop in placed.offsets)
        if any(start < border < stop for start, stop in placed.offsets):
            yield from _apart([questions[row]], [answers[row]], prompt, encoder)
        else:
            yield Pieces(encoder.start + placed.ids[:count], placed.ids[count:] + end, named=placed.named)
