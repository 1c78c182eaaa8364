"""Names of groups: one rule, whatever the file and however it stores them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
from transformers import PreTrainedTokenizerFast

from fedmoe_ds.config.data_section import DataConfig, PartitionConfig
from fedmoe_ds.data.federated import prepare
from fedmoe_ds.data.groups import group_name, group_names
from fedmoe_ds.data.tokenizer import train_tokenizer
from fedmoe_ds.errors import UserError


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["some text"] * 3, 270)


def as_jsonl(path: Path, groups: list[Any]) -> Path:
    path.write_text("".join(json.dumps({"text": "some text", "who": group}) + "\n" for group in groups))
    return path


def as_parquet(path: Path, groups: list[Any]) -> Path:
    pandas.DataFrame({"text": "some text", "who": groups}).to_parquet(path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


WRITERS = [as_jsonl, as_parquet]
NAMES: list[tuple[list[Any], list[str]]] = [
    ([1, 2, 1], ["1", "2", "1"]),
    ([1.0, 2.0, 10.0], ["1", "2", "10"]),
    ([-3, 0, 2**62], ["-3", "0", str(2**62)]),
    (["é", "e\u0301", "x"], ["é", "é", "x"]),
    ([" ann", "ann ", "ann\u00a0lee", "ann  lee"], ["ann", "ann", "ann lee", "ann lee"]),
    ([True, False, True], ["True", "False", "True"]),
    (["007", "7", "1.0"], ["007", "7", "1.0"]),
    (["日本", "\U0001f468\u200d\U0001f469", "می\u200cخواهم"], ["日本", "\U0001f468\u200d\U0001f469", "می\u200cخواهم"]),
]
REFUSED: list[tuple[list[Any], str]] = [
    ([1, 2, None], r"row 3 holds (None|nan), no group's name"),
    ([1, 2.5], r"row 2 holds 2\.5"),
    (["a", None], r"row 2 holds None"),
    (["a", ""], r"row 2 holds ''"),
    (["a", " \u00a0"], r"row 2 holds"),
    (["a", "b\x07"], r"row 2 holds 'b\\x07'"),
    ([2.0**53], r"row 1 holds 9007199254740992\.0"),
    (["ann", "an\u200bn"], r"the names 'ann' and 'an\\u200bn' differ only in invisible characters"),
    (["ann", "\ufeffann"], r"the names 'ann' and '\\ufeffann' differ only in invisible characters"),
    (["a", "\u200b"], r"the names '' and '\\u200b' differ only in invisible characters"),
    ([["a"], ["b"]], r"row 1 holds \['a'\]"),
]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(("groups", "names"), NAMES)
def test_clients_have_these_names(
    write: Callable[[Path, list[Any]], Path],
    groups: list[Any],
    names: list[str],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    config = DataConfig(
        source=str(write(tmp_path / "a.jsonl", groups * 4)), partition=PartitionConfig(column="who"), sequence_length=8
    )
    data = prepare(config, 0, tokenizer, tmp_path)
    assert data.names == sorted(set(names)) and [group_name(group) for group in groups] == names


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(("groups", "message"), REFUSED)
def test_what_names_no_group_is_one_line(
    write: Callable[[Path, list[Any]], Path],
    groups: list[Any],
    message: str,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    config = DataConfig(source=str(write(tmp_path / "a.jsonl", groups)), partition=PartitionConfig(column="who"))
    with pytest.raises(UserError, match=rf"^data\.partition\.column: who: {message}") as caught:
        prepare(config, 0, tokenizer, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_number_and_its_text_are_one_client_and_mixed_types_are_no_surprise(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    assert group_names([1, "1", 1.0, True, "é", "e\u0301"], "who") == ["1", "1", "1", "True", "é", "é"]
    source = as_jsonl(tmp_path / "a.jsonl", [1, "1", 1.0, "b"] * 4)
    config = DataConfig(source=str(source), partition=PartitionConfig(column="who"), sequence_length=8)
    assert prepare(config, 0, tokenizer, tmp_path).names == ["1", "b"]
