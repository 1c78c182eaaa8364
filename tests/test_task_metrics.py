"""Task metrics: exact match and ranked choice against transformers, generations, their summaries, and what is refused."""

from __future__ import annotations

import json
import math
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import run_distributed
from every import every
from federations import Result, alone, build, joined, make_config, run_alone, run_joined, write_inputs
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from fedmoe_ds.config import Config
from fedmoe_ds.data import Sequences
from fedmoe_ds.data.answers import MOST_CHOICES, Answer, AnswerReader, check_prompts, choices
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation.generation import is_exact
from fedmoe_ds.federation.run_spec import check_plan
from fedmoe_ds.federation.task_metrics import TaskMetrics, candidates_of
from fedmoe_ds.planner import evaluation as planned
from fedmoe_ds.planner.hardware import load_hardware
from fedmoe_ds.planner.network import Network
from fedmoe_ds.planner.workload import resolve
from fedmoe_ds.planner.world import World
from fedmoe_ds.report import final_table, write_report
from fedmoe_ds.report.history import History
from fedmoe_ds.report.tasks import across, across_table, task_table

END = 1
"""The model's end-of-text token."""
WORDS = ("a", "b", "cd")
LABELS: dict[str, Any] = {
    "adapters": {"rank": 8, "router": "train"},
    "federation": {"tiers": [{"top_k": 8, "share": 1.0}, {"top_k": 2, "share": 1.0}]},
    "data": {"template": "classification", "partition": {"column": "group"}, "global_holdout": 0.3},
    "local": {"steps": 12, "lr": 2e-2, "clip": None},
    "evaluation": {
        "metrics": ["exact_match", "ranked_choice"],
        "generations": 50,
        "max_new_tokens": 12,
        "max_sequences": None,
        "client_sequences": 3,
        "batch_size": 3,
    },
}
"""Learnt in part: some samples of the hold-out are answered right, and some are not."""


def write_labels(root: Path) -> None:
    """A model, and texts with one of three labels, of which two in five are the first one."""
    write_inputs(root, samples=(1,))
    draw = np.random.default_rng(3)
    rows = []
    for group, count in enumerate((24, 18, 12, 9)):
        for place in range(count):
            # One label is common, so that a model that has learnt little else is right there.
            label = WORDS[place % 5 % 3]
            rows.append({"group": f"client-{group}", "text": "x" * int(draw.integers(1, 9)), "label": label})
    (root / "data.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_labels(folder)
    return folder


@pytest.fixture(scope="module")
def result(root: Path) -> Result:
    return run_alone(make_config(root, "one", LABELS))


class Held:
    """Data with this global hold-out."""

    def __init__(self, part: Sequences) -> None:
        self.part = part

    def global_holdout(self) -> Sequences:
        return self.part


class Untrained:
    """A run before its first round, and transformers' model of the same weights."""

    def __init__(self, root: Path) -> None:
        parts, journal = build(make_config(root, "untrained", LABELS), *alone())
        journal.close()
        self.evaluator, self.personal = parts.evaluator, parts.state.personal
        self.model: Any = AutoModelForCausalLM.from_pretrained(root / "model")
        draw = np.random.default_rng(5)
        self.prompts = [draw.integers(2, 300, size=length) for length in (5, 9, 3, 12, 7, 4, 11, 6)]

    def shares(self, part: Sequences, tasks: TaskMetrics) -> dict[str, float]:
        """The task metrics of the foundation, at the largest tier, on these samples."""
        self.evaluator.data, self.evaluator.tasks = Held(part), tasks  # type: ignore[assignment]
        score = self.evaluator.scores(self.personal, per_client=False, plain=True)[0]
        assert score.label == "8" and score.samples == len(part)
        return dict(score.metrics)

    def generated(self, prompt: np.ndarray, tokens: int, ends: list[int]) -> list[int]:
        """Transformers' own greedy decoding."""
        found = self.model.generate(
            torch.from_numpy(prompt[None]), do_sample=False, max_new_tokens=tokens, eos_token_id=ends, pad_token_id=0
        )
        return found[0, len(prompt) :].tolist()  # type: ignore[no-any-return]

    def log_likelihood(self, prompt: np.ndarray, answer: tuple[int, ...]) -> float:
        ids = torch.from_numpy(np.concatenate([prompt, answer]))[None]
        with torch.no_grad():
            logits_SV = self.model(ids).logits[0].double().log_softmax(-1)
        return sum(float(logits_SV[len(prompt) + i - 1, token]) for i, token in enumerate(answer))


@pytest.fixture(scope="module")
def untrained(root: Path) -> Untrained:
    return Untrained(root)


def samples(prompts: list[np.ndarray], answers: list[tuple[int, ...]]) -> Sequences:
    ids = [np.concatenate([prompt, answer]) for prompt, answer in zip(prompts, answers, strict=True)]
    return Sequences(ids, [np.arange(len(own)) >= len(prompt) for own, prompt in zip(ids, prompts, strict=True)])


def test_exact_match_is_that_of_transformers_greedy_decoding(untrained: Untrained) -> None:
    """Answers that the model gives, with an end and without, and such that differ in one place or go on where they end."""
    free = [untrained.generated(prompt, 5, []) for prompt in untrained.prompts]
    answers = [tuple(found[: 2 + i % 4]) for i, found in enumerate(free)]
    answers[1] = (*answers[1][:-1], (answers[1][-1] + 1) % 300)  # another last token
    answers[4] = ((answers[4][0] + 1) % 300, *answers[4][1:])  # another first one
    answers[6] = (*answers[6], END)  # the model goes on
    special = frozenset({END, answers[0][-1], answers[3][-1]})
    reader = AnswerReader(END, special)
    part = samples(untrained.prompts, answers)
    expected = []
    for prompt, answer in zip(untrained.prompts, answers, strict=True):
        ends = sorted({END, answer[-1]} & special)
        # What stands behind the first end is no part of the answer.
        length = next((i + 1 for i, token in enumerate(answer) if token in ends), len(answer))
        expected.append(untrained.generated(prompt, len(answer), ends)[: len(answer)] == list(answer[:length]))
    assert 3 < sum(expected) < len(expected) and answers[0][-1] in special, expected
    assert untrained.shares(part, TaskMetrics(["exact_match"], reader)) == {"exact_match": sum(expected) / len(expected)}


def test_ranked_choice_is_the_highest_log_likelihood_of_transformers(untrained: Untrained) -> None:
    # What the model itself goes on with after some of the prompts, so that not always the same is the likeliest.
    free = [untrained.generated(untrained.prompts[place], length, []) for place, length in ((0, 2), (3, 2), (5, 3))]
    candidates = [tuple(tokens) for tokens in free]
    found = [[untrained.log_likelihood(prompt, answer) for answer in candidates] for prompt in untrained.prompts]
    best = [int(np.argmax(row)) for row in found]
    right = [i % 3 != 0 for i in range(len(best))]
    part = samples(untrained.prompts, [candidates[b if r else (b + 1) % 3] for b, r in zip(best, right, strict=True)])
    tasks = TaskMetrics(["ranked_choice"], AnswerReader(END, frozenset({END})), candidates)
    assert len(set(best)) > 1, best
    assert untrained.shares(part, tasks) == {"ranked_choice": sum(right) / len(right)}


def rows(result: Result, kind: str, **wanted: Any) -> list[dict[str, Any]]:
    return [e for e in result.events if e["event"] == kind and every(e.get(key) == value for key, value in wanted.items())]


def test_generations_and_exact_match_agree(result: Result) -> None:
    """Generated token by token, and told by one pass: with trained adapters, through every sample of the hold-out."""
    for round_ in (0, 2):
        (score,) = rows(result, "eval", round=round_, split="global", tier_label="8")
        answers = rows(result, "generation", round=round_)
        assert len(answers) == score["samples"] > 2 and not every(e["exact"] is None for e in answers)
        assert sum(bool(e["exact"]) for e in answers) == round(score["exact_match"] * score["samples"])
        assert every(e["prompt"].endswith("Label:") and e["reference"].strip() in WORDS for e in answers)
    assert every((e["answer"] == e["reference"]) == e["exact"] for e in answers if e["ended"])
    assert 0 < score["exact_match"] < 1 and 0 < score["ranked_choice"] < 1


def test_every_row_of_scores_has_the_metrics(result: Result) -> None:
    """Counts behind shares, pooled rows as the sum over clients."""
    for event in rows(result, "eval"):
        for name in ("exact_match", "ranked_choice"):
            assert event[name] * event["samples"] == pytest.approx(round(event[name] * event["samples"]))
    for pooled in rows(result, "eval", split="clients"):
        clients = rows(result, "eval", split="client", round=pooled["round"], tier_label=pooled["tier_label"])
        assert pooled["samples"] == sum(e["samples"] for e in clients) > 4
        right = sum(e["ranked_choice"] * e["samples"] for e in clients)
        assert pooled["ranked_choice"] * pooled["samples"] == pytest.approx(right)


def scored(result: Result) -> list[Any]:
    kinds = [e for e in result.events if e["event"] in ("eval", "generation")]
    return [{key: value for key, value in event.items() if key != "time"} for event in kinds]


def work(rank: int, root: Path) -> list[list[Any]]:
    runtime = joined(rank)
    changes = ({"topology": {"ep_size": size}, "execution": {"clients_in_flight": 2}} for size in (1, 2))
    return [scored(run_joined(make_config(root, f"two-{i}", LABELS, change), runtime)) for i, change in enumerate(changes)]


@pytest.mark.cluster
def test_topologies(root: Path, result: Result) -> None:
    """Bit for bit on two ranks, as clusters of one and as one cluster; a rank has no batch in some turns."""
    for ours in run_distributed(work, 2, root):
        assert every(found == scored(result) for found in ours)


@given(st.lists(st.lists(st.integers(2, 9), min_size=1, max_size=4), min_size=1, max_size=3), st.booleans(), st.booleans())
def test_an_answer_is_the_last_run_of_targets(turns: list[list[int]], ended: bool, more: bool) -> None:
    """Conversations: two tokens of the user, then a turn; the last one with an end, and with what a template puts after it."""
    ids, mask = [], []
    for place, turn in enumerate(turns):
        last = place == len(turns) - 1
        tokens = [*turn, *([END] if ended or not last else []), *([11, 12] if last and ended and more else [])]
        ids += [10, 10, *tokens]
        mask += [False, False, *([True] * len(tokens))]
    answer = AnswerReader(END, frozenset({END}))(np.array(ids), np.array(mask))
    assert answer.tokens == (*turns[-1], *([END] if ended else [])) and tuple(ids[answer.start : answer.stop]) == answer.tokens
    assert answer.ends == {END} and not mask[answer.start - 1]


@pytest.mark.parametrize(
    ("found", "tokens", "exact"),
    [
        ([4, 5, 1], (4, 5, 1), True),
        ([4, 5, 6], (4, 5, 1), False),
        ([4, 5], (4, 5, 1), None),
        ([4, 5, 1], (4, 5), True),
        ([1], (4, 5), False),
        ([], (4, 1), None),
    ],
)
def test_what_a_cut_answer_tells(found: list[int], tokens: tuple[int, ...], exact: bool | None) -> None:
    """A reference without an end may go on; an answer that was cut may still become it."""
    assert is_exact(found, Answer(0, len(tokens), tokens, frozenset({1}))) is exact


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60), st.booleans())
def test_summaries_over_clients(values: list[float], lower: bool) -> None:
    found, ordered = across(values, lower), np.sort(values)[:: -1 if lower else 1]
    assert found.mean == pytest.approx(np.mean(values)) and found.std == pytest.approx(np.std(values), abs=1e-9)
    assert found.worst_tenth == pytest.approx(np.mean(ordered[: math.ceil(len(values) / 10)]))
    assert (found.least, found.most, found.clients) == (min(values), max(values), len(values))


def test_tables_and_page(result: Result) -> None:
    folder = result.parts.checkpoints.parent
    history = History.of(result.events)
    table = final_table(result.events)
    assert "exact match before" in table and "ranked choice before" in table
    assert len({len(line) for line in table.splitlines()}) == 1
    assert "exact match" not in final_table([e for e in result.events if e["event"] != "eval"])
    (score,) = rows(result, "eval", round=2, split="global", tier_label="8")
    assert f"{100 * score['exact_match']:.0f}" in str(task_table(history))
    across_text = str(across_table(history))
    assert "worst tenth" in across_text and "ranked choice" in across_text and "perplexity" in across_text
    before = os.umask(0o022)
    try:
        page = write_report(folder)
    finally:
        os.umask(before)
    text = page.read_text()
    assert "Answers before and after" in text and "Label:" in text and "Exact match, % of samples" in text
    for path in (page, folder / "metrics.jsonl"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, "what clients have written is private"


def test_what_an_evaluation_is_predicted_to_cost(result: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    job = resolve(result.parts.config)
    assert job.data.candidates == len(WORDS)
    monkeypatch.setattr(planned, "_scored", lambda job, network, hardware, ep_size, batches, cap: float(len(batches)))
    world = World(1, 1)
    network = Network(load_hardware("cpu"), world)

    def seconds(job: Any, round_index: int) -> float:
        asked = planned.Evaluation.of(job, round_index)
        return planned.one_evaluation_seconds(job, network, network.hardware, 1, asked, 1)

    plain = replace(job, data=replace(job.data, candidates=0))
    assert seconds(plain, 1) * 4 == seconds(job, 1) > 0
    tokens, batches = job.config.evaluation.max_new_tokens, math.ceil(len(job.data.global_holdout.rows) / 3)
    per_client = seconds(plain, 2) - tokens * batches
    assert per_client > seconds(plain, 1), "the last round generates, and scores every client"


def test_refusals(tmp_path: Path) -> None:
    for key, evaluation in (
        ("evaluation.metrics: exact_match", {"metrics": ["exact_match"]}),
        ("evaluation.generations: 2", {"generations": 2}),
    ):
        text = Config.model_validate({"evaluation": evaluation, "data": {"template": "text"}})
        with pytest.raises(UserError, match=rf"^{key}: samples of data\.template=text are documents: .*drop the key$"):
            check_plan(text, bitwise=True)
        images = Config.model_validate(
            {
                "evaluation": evaluation,
                "foundation": {"preset": "tiny-vit"},
                "data": {"source": "digits"},
                "adapters": {"moe": {}},
            }
        )
        with pytest.raises(UserError, match=rf"^{key}: images have a class .*drop the key$"):
            check_plan(images, bitwise=True)
    document = Sequences([np.arange(5)], [np.arange(5) > 0])
    with pytest.raises(UserError, match=r"^evaluation\.metrics: exact_match: samples of data\.template=text"):
        check_prompts(document, "evaluation.metrics: exact_match")


class Owners(Held):
    """One client with these samples, and a global hold-out of the first."""

    sequence_length = 40

    def __init__(self, part: Sequences) -> None:
        super().__init__(part.select([0]))
        self.all = part

    def __len__(self) -> int:
        return 1

    def train(self, client: int) -> Sequences:
        return self.all

    def holdout(self, client: int) -> Sequences:
        return self.all.select([])


def test_candidates_are_all_answers_of_the_data(root: Path, result: Result) -> None:
    tokenizer = result.parts.foundation.tokenizer
    found = candidates_of(result.parts.config.evaluation, tokenizer, result.parts.data, None)
    assert {tokenizer.decode(tokens[:-1]) for tokens in found} == {f" {word}" for word in WORDS}
    reader = AnswerReader(END, frozenset({END}))
    for count, words in ((1, "have 1 different answers"), (MOST_CHOICES + 1, f"have more than {MOST_CHOICES} different")):
        many: Any = Owners(samples([np.array([5, 6])] * count, [(7 + i, END) for i in range(count)]))
        with pytest.raises(UserError, match=rf"^evaluation\.metrics: ranked_choice: the data {words}.*use exact_match$"):
            choices(many, reader)
    few: Any = Owners(samples([np.array([5, 6])] * 2, [(7, END), (8, 9, 9, END)]))
    with pytest.raises(UserError, match=r"^data\.sequence_length: 40: .* has 41 positions; use at most 39$"):
        candidates_of(result.parts.config.evaluation, tokenizer, few, 41)
    assert candidates_of(result.parts.config.evaluation, tokenizer, few, 42) == [(7, END), (8, 9, 9, END)]
