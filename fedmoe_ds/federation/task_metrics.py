"""Task metrics: what share of the samples a model gets right, beside the likelihood of their tokens.

`exact_match`: greedy decoding from the prompt gives the reference answer, token by token, and then ends as it does. That is so
if and only if at every target of the answer the likeliest token is the target, given the reference before it: the first token
that greedy decoding has otherwise is a target that is not the likeliest. So the pass that tells the accuracy tells it too, and
nothing is generated. No normalisation comes in: an answer in other letters, or with another space, is another answer.

`ranked_choice`: of all answers in the data (`fedmoe_ds.data.answers.choices`) the reference has the highest log-likelihood
after the prompt, the sum over its tokens, end-of-text included: `acc` of lm-evaluation-harness, which leaves that token out.
Each candidate is a pass over the batch; of equal ones the first in order counts.

`view_0`, `view_1`: where models of one client read a view of an image each, that model alone names the class.

Legend: N targets of a pass, B its samples, C candidates, M metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from fedmoe_ds.config import Config, EvaluationConfig
from fedmoe_ds.data import Sequences, Task
from fedmoe_ds.data.answers import Answer, AnswerData, AnswerReader, check_prompts, choices, no_prompt
from fedmoe_ds.distributed.runtime import Runtime
from fedmoe_ds.errors import UserError
from fedmoe_ds.foundation import Foundation
from fedmoe_ds.foundation.context_length import longest_sequence
from fedmoe_ds.model.cross_entropy import mean_logits
from fedmoe_ds.model.forward import PassResult

Forward = Callable[[list[Sequences]], PassResult]
"""One pass over samples in parts; every rank of a cluster calls it as often, with no part where it has none."""


VIEW = "view_"
"""Before the number of a view."""


@dataclass(frozen=True)
class TaskMetrics:
    """The task metrics that a run asks for; `candidates` are those of `ranked_choice`, token by token."""

    names: Sequence[str]
    reader: AnswerReader | None = None
    candidates: Sequence[tuple[int, ...]] = ()

    @classmethod
    def of(
        cls, config: EvaluationConfig, foundation: Foundation, data: AnswerData, runtime: Runtime, views: int = 1
    ) -> TaskMetrics:
        """Collective. Raises UserError, the same on every rank, where the data do not have what a metric needs."""
        if answer_key(config) is None:
            return cls([f"{VIEW}{place}" for place in range(views)] if views > 1 else [])
        # Rank 0 alone reads the answers of all clients.
        longest = longest_sequence(foundation.model.config)
        candidates = runtime.run_on_rank0(lambda: candidates_of(config, foundation.tokenizer, data, longest))
        names = list(dict.fromkeys(config.metrics))
        return cls(names, AnswerReader.of(foundation.tokenizer), [tuple(tokens) for tokens in candidates])

    def answers(self, part: Sequences) -> list[Answer]:
        """The answer of every sample."""
        assert self.reader is not None, "no key asks for answers"
        return self.reader.each(part)

    def right(self, parts: list[Sequences], result: PassResult, forward: Forward) -> list[list[bool]]:
        """Whether each metric counts a sample as right, metric by metric, over the samples of all parts in their order.

        Args:
            parts: in the pass; none on a rank that only takes part in it.
            result: of the pass.
        """
        ways = {"exact_match": self._exact, "ranked_choice": self._ranked}
        ways |= {f"{VIEW}{place}": partial(_by_view, place) for place in range(len(result.members))}
        return [ways[name](parts, result, forward) for name in self.names]

    def _exact(self, parts: list[Sequences], result: PassResult, forward: Forward) -> list[bool]:
        """Samples whose answer greedy decoding gives."""
        masks = [mask for part in parts for mask in part.loss_mask]
        answers = [answer for part in parts for answer in self.answers(part)]
        # Back onto the samples: targets stand in row order.
        per_sample = torch.split(result.correct_N.cpu(), [int(mask.sum()) for mask in masks])
        right = []
        for correct_N, mask, answer in zip(per_sample, masks, answers, strict=True):
            first = int(mask[: answer.start].sum())
            right.append(bool(correct_N[first : first + len(answer.tokens)].all()))
        return right

    def _ranked(self, parts: list[Sequences], result: PassResult, forward: Forward) -> list[bool]:
        """Samples whose answer is the likeliest of the candidates."""
        assert self.reader is not None, "no key asks for answers"
        nll_CB = []
        for tokens in self.candidates:
            asked = forward([self.reader.asked(part, tokens) for part in parts])
            nll_CB.append([float(nll.sum()) for nll in torch.split(asked.nll_N.double().cpu(), len(tokens))] if parts else [])
        answers = [answer.tokens for part in parts for answer in self.answers(part)]
        # argmin takes the first of equal ones.
        best_B = np.array(nll_CB).argmin(0) if answers else []
        return [self.candidates[best] == tokens for best, tokens in zip(best_B, answers, strict=True)]


def _by_view(place: int, parts: list[Sequences], result: PassResult, forward: Forward) -> list[bool]:
    """Samples whose class the model of one view names."""
    labels = [part.labels for part in parts if part.labels is not None]
    named_N = mean_logits(result.head, [result.members[place]]).argmax(-1).cpu().numpy()
    return (named_N == np.concatenate(labels)).tolist() if labels else []


def candidates_of(config: EvaluationConfig, tokenizer: Any, data: AnswerData, longest: int | None) -> list[tuple[int, ...]]:
    """What a sample's answer is ranked against; none where nothing asks for it. `longest`: positions that the model has.

    Raises:
        UserError: as `TaskMetrics.of`, or where a prompt with the longest candidate may need more positions.
    """
    key = answer_key(config)
    if key is None:
        return []
    check_prompts(data.global_holdout(), key)
    if "ranked_choice" not in config.metrics:
        return []
    found = choices(data, AnswerReader.of(tokenizer))
    sizes = [len(tokens) for tokens in found]
    most = None if longest is None else longest - max(sizes) + min(sizes)
    if most is not None and data.sequence_length > most:
        raise UserError(
            f"data.sequence_length: {data.sequence_length}: evaluation.metrics: ranked_choice puts longer answers after the "
            f"prompts, and the foundation has {longest} positions; use at most {most}"
        )
    return found


def check_task_metrics(config: Config, task: Task) -> None:
    """Raise UserError where data of this kind have no answers, as far as the configuration tells."""
    key = answer_key(config.evaluation)
    if key is None:
        return
    if task != "causal_lm":
        raise UserError(f"{key}: images have a class and no answer in words, and accuracy tells it; drop the key")
    if config.data.template == "text":
        raise no_prompt(key)


def answer_key(config: EvaluationConfig) -> str | None:
    """The first key that asks for answers, with its value, as messages name it; None where none does."""
    if config.metrics:
        return f"evaluation.metrics: {config.metrics[0]}"
    return f"evaluation.generations: {config.generations}" if config.generations else None
