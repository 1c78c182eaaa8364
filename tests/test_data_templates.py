"""Templates: which tokens a row becomes, and which of them are targets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from every import every
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from fedmoe_ds.config.schema import DataConfig
from fedmoe_ds.data import templates
from fedmoe_ds.data.encoder import Encoder
from fedmoe_ds.data.omissions import CUT, EMPTY, NO_ROOM
from fedmoe_ds.data.table import Table
from fedmoe_ds.data.tokenizer import train_tokenizer
from fedmoe_ds.errors import UserError

EOS = 1


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["hello world, this is a text. Sports Business label\n"] * 3, 280)


def encode(tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]] | Dataset, **config: Any) -> templates.Samples:
    data = DataConfig(**config)
    table = Table.of_dataset(rows if isinstance(rows, Dataset) else Dataset.from_list(rows), templates.candidates(data))
    data = templates.resolve_template(table, data)
    columns = templates.resolve_columns(table, data)
    templates.check_rows(table, columns, data)
    return templates.encode(table, columns, data, Encoder(tokenizer))


def targets(samples: templates.Samples, tokenizer: PreTrainedTokenizerFast, index: int = 0) -> str:
    """The text of the target tokens."""
    return str(tokenizer.decode(samples.tokens[index][samples.loss_mask[index]]))


def test_text_ends_every_document_and_drops_empty_ones(tokenizer: PreTrainedTokenizerFast) -> None:
    samples = encode(tokenizer, [{"text": "hello"}, {"text": " \n"}, {"text": "world" * 100}], sequence_length=8)
    assert samples.rows == [0, 2] and samples.omissions == [(1, EMPTY)]
    assert [ids[-1] for ids in samples.tokens] == [EOS, EOS]
    assert len(samples.tokens[1]) > 8


@pytest.mark.parametrize(("tokens", "lengths"), [(8, [8]), (9, [8]), (10, [8, 2]), (3, [3]), (17, [8, 8]), (2, [2])])
def test_pack(tokens: int, lengths: list[int]) -> None:
    stream = np.arange(tokens)
    chunks = templates.pack(np.array_split(stream, 2), 8)
    assert [len(chunk) for chunk in chunks] == lengths
    assert np.array_equal(np.concatenate(chunks), stream[: sum(lengths)])
    assert templates.all_but_first(chunks[0]).tolist() == [False] + [True] * (lengths[0] - 1)


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Say hello", "input": "to Bob", "output": "hello Bob"},
        {"instruction": "Say hello", "input": "to Bob", "output": "hello Bob", "score": 4.5, "text": "whole"},
        {"instruction": "Say hello", "context": "to Bob", "response": "hello Bob", "category": "qa"},
    ],
    ids=["alpaca", "alpagasus", "dolly"],
)
def test_instruction_learns_the_answer_and_the_end(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any]) -> None:
    samples = encode(tokenizer, [row], template="instruction")
    assert targets(samples, tokenizer) == "hello Bob<|endoftext|>"
    whole = tokenizer.decode(samples.tokens[0])
    assert "Say hello" in whole and "to Bob" in whole and whole.index("to Bob") < whole.index("hello Bob")


def test_instruction_without_input_has_no_input_heading(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"instruction": "a", "input": "", "output": "b"}, {"instruction": "a", "input": None, "output": "b"}]
    samples = encode(tokenizer, rows, template="instruction")
    assert "Input" not in tokenizer.decode(samples.tokens[0])
    bare = encode(tokenizer, [{"instruction": "a", "output": "b"}], template="instruction")
    assert every(np.array_equal(ids, bare.tokens[0]) for ids in samples.tokens)


def test_instruction_truncates_and_counts_what_is_lost(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [
        {"instruction": "a", "output": "b" * 500},
        {"instruction": "a" * 500, "output": "b"},
        {"instruction": "a", "output": None},
        {"instruction": "a", "output": "fine"},
    ]
    samples = encode(tokenizer, rows, template="instruction", sequence_length=64)
    assert samples.rows == [0, 3] and samples.omissions == [(0, CUT), (1, NO_ROOM), (2, EMPTY)]
    assert len(samples.tokens[0]) == 64 and targets(samples, tokenizer).startswith("b" * 5)
    assert samples.tokens[0][-1] != EOS


def test_mapped_columns(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"q": "Say hello", "a": "hello", "instruction": "wrong"}]
    config = {"template": "instruction", "columns": {"instruction": "q", "response": "a"}}
    samples = encode(tokenizer, rows, **config)
    assert targets(samples, tokenizer) == "hello<|endoftext|>"
    assert "wrong" not in tokenizer.decode(samples.tokens[0])


NEWS = [{"text": "shares fell", "label": 1}, {"text": "they won", "label": 0}]
FEATURES = Features({"text": Value("string"), "label": ClassLabel(names=["Sports", "Business"])})


@pytest.mark.parametrize(
    ("rows", "config"),
    [
        (NEWS, {"label_names": ["Sports", "Business"]}),
        (Dataset.from_list(NEWS, features=FEATURES), {}),
        ([{"text": "shares fell", "label": "Business"}, {"text": "they won", "label": "Sports"}], {}),
    ],
    ids=["label_names", "class_label", "strings"],
)
def test_classification_learns_the_label_words(tokenizer: PreTrainedTokenizerFast, rows: Any, config: dict[str, Any]) -> None:
    samples = encode(tokenizer, rows, template="classification", **config)
    assert [targets(samples, tokenizer, i).strip() for i in range(2)] == [
        "Business<|endoftext|>",
        "Sports<|endoftext|>",
    ]


def test_classification_cuts_the_text_and_never_the_label(tokenizer: PreTrainedTokenizerFast) -> None:
    samples = encode(tokenizer, [{"text": "x y " * 500, "label": "Sports"}], template="classification", sequence_length=48)
    assert len(samples.tokens[0]) == 48
    assert targets(samples, tokenizer).strip() == "Sports<|endoftext|>"


def test_a_leading_token_is_added_where_the_tokenizer_adds_one(tokenizer: PreTrainedTokenizerFast) -> None:
    leading = train_tokenizer(["hello world"] * 3, 270)
    leading.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", EOS)]
    )
    row = {"instruction": "a", "output": "b"}
    with_start, without = (encode(t, [row], template="instruction") for t in (leading, tokenizer))
    assert with_start.tokens[0][0] == EOS != without.tokens[0][0]
    assert not with_start.loss_mask[0][0] and targets(with_start, leading) == "b<|endoftext|>"


@pytest.mark.parametrize(
    ("rows", "config", "message"),
    [
        (
            [{"body": "x"}],
            {},
            r"data\.columns: text: no such column .* present: body; map it with data\.columns\.text=",
        ),
        ([{"text": "x"}], {"template": "instruction"}, r"instruction: no such column"),
        ([{"instruction": "x"}], {"template": "instruction"}, r"output or response: no such column"),
        ([{"text": "x"}], {"columns": {"text": "txt"}}, r"data\.columns\.text: txt: no such column; present: text"),
        ([{"text": "x"}], {"columns": {"txet": "text"}}, r"txet: no field of template 'text'; did you mean 'text'"),
        ([{"text": "x"}, {"text": None}], {}, r"row 2: column 'text' is missing"),
        ([{"text": 5}], {}, r"row 1: column 'text' holds 5, not text"),
        ([{"text": "x", "label": 1}], {"template": "classification"}, r"an integer without words"),
        ([{"text": "x", "label": 2}], {"template": "classification", "label_names": ["a", "b"]}, r"outside 0\.\.1"),
        ([{"text": "x", "label": "c"}], {"template": "classification", "label_names": ["a"]}, r"not among the label"),
        ([{"text": "x", "label": 0.5}], {"template": "classification"}, r"neither an integer nor a word"),
        ([{"text": "x", "label": ""}], {"template": "classification"}, r"is empty"),
    ],
)
def test_bad_rows_and_columns(
    tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]], config: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        encode(tokenizer, rows, **config)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_an_end_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match="no end-of-text token"):
        Encoder(endless)
