"""Prompts: every preset to the letter, pieces that differ, and what a prompt cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import chats
import pytest
from pydantic import ValidationError
from test_data_chat import encode

from fedmoe_ds.config import load_config
from fedmoe_ds.config.prompt import PRESETS, PromptConfig
from fedmoe_ds.config.schema import DataConfig
from fedmoe_ds.data.encoder import Encoder
from fedmoe_ds.data.omissions import CUT, EMPTY, NAMED, NO_ROOM
from fedmoe_ds.errors import UserError

TASK = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
PAIRED = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
ROW = {"instruction": "add", "input": "2 2", "output": "4"}
BARE = {"instruction": "add", "input": "", "output": "4"}
# preset: the whole text with an input, without one, and how much of its end is learned.
TEXTS = {
    "plain": (
        "### Instruction:\nadd\n\n### Input:\n2 2\n\n### Response:\n4$",
        "### Instruction:\nadd\n\n### Response:\n4$",
        "4$",
    ),
    "alpaca": (
        f"{PAIRED}\n\n### Instruction:\nadd\n\n### Input:\n2 2\n\n### Response:4$",
        f"{TASK}\n\n### Instruction:\nadd\n\n### Response:4$",
        "4$",
    ),
    "openfedllm": (
        f"{TASK}\n\n### Instruction:\nadd 2 2 \n\n### Response: 4$",
        f"{TASK}\n\n### Instruction:\nadd \n\n### Response: 4$",
        " 4$",
    ),
    "flowertune-general": (
        f"{TASK}\n### Instruction:\nadd\n### Response: 4",
        f"{TASK}\n### Instruction:\nadd\n### Response: 4",
        " 4",
    ),
    "flowertune-finance": (
        f"{TASK}\n### Instruction:\nadd 2 2\n### Response: 4",
        f"{TASK}\n### Instruction:\nadd \n### Response: 4",
        " 4",
    ),
    "flowertune-medical": (
        f"{TASK}\n### Instruction:\n2 2\n### Response: 4",
        f"{TASK}\n### Instruction:\n\n### Response: 4",
        " 4",
    ),
    "flowertune-code": (
        f"{TASK}\n### Instruction:\nadd 2 2\n### Response: 4",
        f"{TASK}\n### Instruction:\nadd \n### Response: 4",
        " 4",
    ),
}


def test_all_presets_are_here() -> None:
    assert TEXTS.keys() == PRESETS.keys()


@pytest.mark.parametrize("preset", TEXTS)
@pytest.mark.parametrize("name", ["chatml", "mistral"])
def test_presets_to_the_letter(preset: str, name: str) -> None:
    """The tokens are those of the whole text, as published code makes them; `$` stands for the end-of-text token."""
    tokenizer = chats.tokenizer(name)
    samples = encode(tokenizer, [ROW, BARE], template="instruction", prompt=PromptConfig(preset=preset))  # type: ignore[arg-type]
    end = tokenizer.eos_token
    with_input, without, learned = (text.replace("$", end) for text in TEXTS[preset])
    start = len(Encoder(tokenizer).start)
    for index, text in enumerate((with_input, without)):
        ids, mask = samples.tokens[index], samples.loss_mask[index]
        assert tokenizer.decode(ids[start:]) == text
        assert tokenizer.decode(ids[mask]) == learned
        if preset != "plain" or name == "chatml":  # plain encodes its halves apart, as it always did
            assert ids[start:].tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_pieces_differ_from_the_preset(tmp_path: Path) -> None:
    tokenizer = chats.tokenizer("chatml")
    pieces = {"preamble": "Sums.\n", "response_header": "\n=", "end_of_text": True, "input": "always", "input_header": "+"}
    given = PromptConfig(preset="flowertune-general", **pieces)  # type: ignore[arg-type]
    samples = encode(tokenizer, [ROW], template="instruction", prompt=given)
    assert tokenizer.decode(samples.tokens[0]) == "Sums.\n### Instruction:\nadd+2 2\n= 4<|endoftext|>"
    (tmp_path / "a.yaml").write_text("data: {template: instruction, prompt: alpaca}\n")
    config = load_config(tmp_path / "a.yaml")
    assert config.data.prompt == PromptConfig(preset="alpaca") and config.data.prompt.resolved() == PRESETS["alpaca"]
    config = load_config(tmp_path / "a.yaml", ["data.prompt=openfedllm"])
    assert config.data.prompt.resolved() == PRESETS["openfedllm"]
    with pytest.raises(UserError, match=r"data\.prompt\.preset: vicuna: expected one of plain, alpaca"):
        load_config(tmp_path / "a.yaml", ["data.prompt=vicuna"])


@pytest.mark.parametrize("preset", ["alpaca", "flowertune-general"])
def test_the_rules_of_instructions_hold_for_every_prompt(preset: Any) -> None:
    tokenizer, prompt = chats.tokenizer("chatml"), PromptConfig(preset=preset)
    rows = [
        {"instruction": "add", "output": "a" * 300},
        {"instruction": "a" * 500, "output": "b"},
        {"instruction": "add", "output": None},
        {"instruction": "add <|im_end|>", "output": "4 <|endoftext|>"},
    ]
    samples = encode(tokenizer, rows, template="instruction", prompt=prompt, sequence_length=200)
    assert samples.rows == [0, 3] and samples.omissions == [(0, CUT), (1, NO_ROOM), (2, EMPTY), (3, NAMED)]
    ends = samples.tokens[1] == tokenizer.eos_token_id
    assert ends.sum() == (preset == "alpaca") and not ends[:-1].any()
    assert tokenizer.decode(samples.tokens[1][samples.loss_mask[1]]).lstrip().startswith("4 <|endoftext|>")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"prompt": "alpaca"}, r"prompt: for data\.template=instruction only, and it is auto"),
        ({"prompt": "alpaca", "template": "chat"}, r"prompt: for data\.template=instruction only, and it is chat"),
        ({"chat_template": "a", "template": "text"}, r"chat_template: for data\.template=chat only"),
        ({"prompt": {"preset": "flowertune-general", "input_header": " "}, "template": "instruction"}, r"input_header: the in"),
    ],
)  # fmt: skip
def test_keys_without_effect_are_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig.model_validate(data)


@pytest.mark.parametrize(
    ("preset", "row", "columns", "message"),
    [
        ("flowertune-code", {"instruction": "a", "output": "b"}, {}, r"input or context: no such column"),
        ("flowertune-medical", {"instruction": "a", "output": "b"}, {}, r"input or context: no such column"),
        ("flowertune-general", ROW, {"input": "input"}, r"data\.columns\.input: input: data\.prompt leaves the input out"),
        ("flowertune-medical", ROW, {"instruction": "input"}, r"data\.prompt leaves the instruction out"),
    ],
)
def test_columns_that_a_prompt_needs(preset: Any, row: dict[str, str], columns: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        encode(chats.tokenizer("chatml"), [row], template="instruction", columns=columns, prompt=PromptConfig(preset=preset))


def test_a_medical_row_needs_no_instruction() -> None:
    prompt = PromptConfig(preset="flowertune-medical")
    samples = encode(chats.tokenizer("chatml"), [{"input": "q", "output": "a"}], template="instruction", prompt=prompt)
    assert chats.tokenizer("chatml").decode(samples.tokens[0]) == f"{TASK}\n### Instruction:\nq\n### Response: a"


PIECES: dict[str, Any] = {
    "preamble": "x",
    "preamble_with_input": "x",
    "instruction_header": "x",
    "input": "only",
    "input_header": "x",
    "response_header": "x",
    "answer_lead": "x",
    "end_of_text": False,
}


@pytest.mark.parametrize("piece", PIECES)
def test_every_piece_changes_the_tokens(piece: str) -> None:
    """So it belongs to the identity of a run, by the fingerprint of its data."""
    assert PIECES.keys() == PromptConfig.model_fields.keys() - {"preset"}
    tokenizer = chats.tokenizer("chatml")
    changed = PromptConfig(**{piece: PIECES[piece]})
    usual, other = (encode(tokenizer, [ROW], template="instruction", prompt=prompt) for prompt in (PromptConfig(), changed))
    assert usual.tokens[0].tolist() != other.tokens[0].tolist()
