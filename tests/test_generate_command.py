"""What a run's model answers: token for token what transformers and PEFT make of its exports, and the run's own answers."""

from __future__ import annotations

import io
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import chats
import numpy as np
import pytest
import torch
from dense_inputs import dense_config, write_dense
from federations import Result, make_config, run_alone, write_inputs
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedmoe_ds.data import ImageInput
from fedmoe_ds.data.encoder import Encoder
from fedmoe_ds.data.templates.question import RAW, chat_reading, question
from fedmoe_ds.errors import UserError
from fedmoe_ds.export.command import main as export
from fedmoe_ds.results import answering, open_run
from fedmoe_ds.results.generate_command import main

SHORT: dict[str, Any] = {
    "federation": {"rounds": 1},
    "local": {"max_steps": 3, "lr": 2e-2, "clip": None},
    "evaluation": {"client_sequences": 0, "max_sequences": 2, "generations": 2, "max_new_tokens": 6},
}
WORDS = ["w03 w07", "w11 w15 w12"]
TOKENS = 8


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("generate")
    write_inputs(root, samples=(14, 9, 7, 5), num_hidden_layers=2, num_experts=4, num_experts_per_tok=2)
    return root


@pytest.fixture(scope="module")
def run(root: Path) -> Result:
    return run_alone(make_config(root, "run", SHORT, {"method": {"name": "fedit"}}))


@pytest.fixture(scope="module")
def folder(root: Path, run: Result) -> Path:
    return root / "runs" / "run"


def said(capsys: pytest.CaptureFixture[str], *argv: object) -> list[str]:
    """The answers on standard output."""
    capsys.readouterr()
    assert main([str(each) for each in argv]) == 0
    return capsys.readouterr().out.removesuffix("\n").split("\n\n")


def asked(words: list[str]) -> list[str]:
    return [part for each in words for part in ("--prompt", each)]


def theirs(model: Any, tokenizer: Any, texts: list[str]) -> list[str]:
    """Greedy answers of transformers' own generation."""
    found = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False,
                             pad_token_id=0, eos_token_id=tokenizer.eos_token_id)  # fmt: skip
        found.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return found


def instructed(words: list[str]) -> list[str]:
    return [f"### Instruction:\n{each}\n\n### Response:\n" for each in words]


def shown(text: str) -> str:
    """As a terminal is shown it."""
    from fedmoe_ds.terminal import visible

    return visible(text, lines=True)


def test_the_answers_of_transformers_and_peft(
    root: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At both tiers, of the foundation, and without a template."""
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    base = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32)
    plain = [shown(text) for text in theirs(base, tokenizer, instructed(WORDS))]
    more = ["--max-new-tokens", TOKENS]
    export([str(folder), "--format", "peft", "--out", str(tmp_path / "peft")])
    peft = PeftModel.from_pretrained(base, str(tmp_path / "peft"))
    full = [shown(text) for text in theirs(peft, tokenizer, instructed(WORDS))]
    assert full != plain
    found = said(capsys, folder, *asked(WORDS), *more)
    assert found == full
    assert said(capsys, folder, "--raw", *asked(WORDS), *more) == [shown(text) for text in theirs(peft, tokenizer, WORDS)]
    blocks = said(capsys, folder, "--before", *asked(WORDS), *more)
    expected = zip(range(1, 3), WORDS, plain, full, strict=True)
    assert blocks == [f"[prompt {i}]\n{w}\n[foundation]\n{a}\n[round 1, k=2]\n{b}" for i, w, a, b in expected]
    export([str(folder), "--format", "merged", "--tier", "1", "--out", str(tmp_path / "merged")])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert merged.config.num_experts_per_tok == 1
    lower = [shown(text) for text in theirs(merged, tokenizer, instructed(WORDS))]
    assert said(capsys, folder, "--tier", 1, *asked(WORDS), *more) == lower != full


def words_of(path: Path, prompt: str) -> str:
    """The instruction that a prompt was made of."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return next(row["instruction"] for row in rows if prompt == f"### Instruction:\n{row['instruction']}\n\n### Response:\n")


@pytest.mark.parametrize("kind", ["flame", "fft-moe", "local-only"])
def test_the_answers_of_the_run_itself(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As `evaluation.generations` has recorded them: with a rescaler, adapter experts, and of one client's own model."""
    if kind == "fft-moe":
        write_dense(tmp_path, ("llama",), samples=(14, 9, 7, 5))
        config = dense_config(tmp_path, "llama", "run", SHORT)
    else:
        write_inputs(tmp_path, samples=(14, 9, 7, 5), num_hidden_layers=1, num_experts=4, num_experts_per_tok=2)
        config = make_config(tmp_path, "run", SHORT, {"method": {"name": kind}})
    rows = [row for row in run_alone(config).events if row["event"] == "generation"]
    assert {row["round"] for row in rows} == {0, 1}
    prompts = [words_of(tmp_path / "data.jsonl", row["prompt"]) for row in rows if row["round"] == 1]
    argv = [tmp_path / "runs" / config.name, *asked(prompts), "--max-new-tokens", 6]
    whose = ["--client", rows[-1]["client"]] if kind == "local-only" else []
    assert said(capsys, *argv, *whose) == [shown(row["answer"]) for row in rows if row["round"] == 1]
    if kind != "local-only":
        before = [block.split("\n[")[1].partition("]\n")[2] for block in said(capsys, *argv, "--before")]
        assert before == [shown(row["answer"]) for row in rows if row["round"] == 0]


def test_drawn_answers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same with the same seed, another with another; no prompt's draws depend on the others; close to 0, the likeliest."""
    how = ["--max-new-tokens", TOKENS, "--temperature"]
    first = said(capsys, folder, *asked(WORDS), *how, 1.0, "--seed", 3)
    assert said(capsys, folder, *asked(WORDS[:1]), *how, 1.0, "--seed", 3) == first[:1]
    assert said(capsys, folder, *asked(WORDS), *how, 1.0) != first
    assert said(capsys, folder, *asked(WORDS), *how, 1e-6) == said(capsys, folder, *asked(WORDS), *how[:2])


def test_standard_input(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{WORDS[0]}\n"))
    short = ["--max-new-tokens", 3, "--prompt"]
    assert said(capsys, folder, *short, "-") == said(capsys, folder, *short, WORDS[0])


@pytest.mark.parametrize("style", list(chats.STYLES))
@pytest.mark.parametrize("marked", [False, True])
def test_a_chat_is_asked_as_transformers_writes_it(style: str, marked: bool) -> None:
    """Names of special tokens in the user's words stay text; the token that ends a turn ends the answer."""
    known = chats.STYLES[style]
    tokenizer = chats.tokenizer(style)
    encoder, text = Encoder(tokenizer), known.marked if marked else known.plain
    reading = {"template": "chat", "chat_template": {"origin": "file", "text": text}}
    found = question("What is 2 + 2?", reading, encoder)
    turns = [{"role": "user", "content": "What is 2 + 2?"}]
    expected = tokenizer.apply_chat_template(turns, chat_template=text, add_generation_prompt=True, return_dict=False)
    if "strftime_now" not in text:
        assert found.ids.tolist() == list(expected)
    assert tokenizer.eos_token_id in found.ends
    named = question(f"a {known.specials[-1]} b", reading, encoder)
    of_the_name = tokenizer.convert_tokens_to_ids(known.specials[-1])
    plain = question("a b", reading, encoder)
    assert np.count_nonzero(named.ids == of_the_name) == np.count_nonzero(plain.ids == of_the_name)


def test_ways_to_ask() -> None:
    tokenizer = chats.tokenizer("chatml")
    encoder = Encoder(tokenizer)
    label = question("a", {"template": "classification"}, encoder)
    assert tokenizer.decode(label.ids) == "a\nLabel:" and label.ends == {tokenizer.eos_token_id}
    only = {"preamble": "P\n", "input": "only", "instruction_header": "", "response_header": "\nR:"}
    assert tokenizer.decode(question("a", {"template": "instruction", "prompt": only}, encoder).ids) == "P\na\nR:"
    assert tokenizer.decode(question("a", RAW, encoder).ids) == "a"
    assert chat_reading(RAW, encoder)["template"] == "chat"
    for reading, words in (({"template": "poem"}, "template poem: not known"), ({"template": "instruction"}, "prompt")):
        with pytest.raises(UserError, match=words):
            question("a", reading, encoder)


def test_what_is_refused(root: Path, folder: Path, tmp_path: Path) -> None:
    cases = {
        "--prompt: is empty": ["--prompt", " "],
        "standard input can be read once": ["--prompt", "-", "--prompt", "-"],
        "--max-new-tokens: 0: must be 1": ["--prompt", "a", "--max-new-tokens", "0"],
        "--temperature: -1.0: must be 0": ["--prompt", "a", "--temperature", "-1"],
        "--temperature: nan": ["--prompt", "a", "--temperature", "nan"],
        "--seed: 3: greedy decoding draws nothing": ["--prompt", "a", "--seed", "3"],
        "--tier: 7: is no tier": ["--prompt", "a", "--tier", "7"],
        "--client: bob: no client": ["--prompt", "a", "--client", "bob"],
        "--round: 9: no checkpoint": ["--prompt", "a", "--round", "9"],
        "number 2 has 1810 tokens, and the model has 128 positions": ["--prompt", "a", "--prompt", "a b c " * 300],
    }
    for words, argv in cases.items():
        with pytest.raises(UserError) as caught:
            main([str(folder), *argv])
        assert words in str(caught.value)
    with pytest.raises(SystemExit):
        main([str(folder), "--prompt", "a", "--chat", "--raw"])
    # A record of an earlier version does not say how rows were read.
    shutil.copytree(folder, tmp_path / "old")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("reading", None)
    (tmp_path / "old" / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    with pytest.raises(UserError, match="does not say how its data were read; add --raw or --chat"):
        main([str(tmp_path / "old"), "--prompt", "a"])
    assert main([str(tmp_path / "old"), "--prompt", "a", "--raw", "--max-new-tokens", "1"]) == 0
    assert main([str(tmp_path / "old"), "--prompt", "a", "--chat", "--max-new-tokens", "1"]) == 0


def test_images_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_run(folder)
    images = replace(opened, spec=replace(opened.spec, images=ImageInput(1, 8, 8, 10, 17)))
    monkeypatch.setattr(answering, "open_run", lambda *argv: images)
    with pytest.raises(UserError, match="its model classifies images, and writes no text"):
        main([str(folder), "--prompt", "a"])
