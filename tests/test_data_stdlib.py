"""The standard library as a corpus, and the tokenizer that is trained on it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from every import every

from fedmoe_ds.data import stdlib
from fedmoe_ds.data.tokenizer import train_tokenizer

TEXTS = ["def f(x):\n    return x + 1\n", "class A:\n    pass\n", "import os, sys\n"] * 20


@pytest.fixture(scope="module")
def corpus() -> list[stdlib.Document]:
    return stdlib.documents()


def test_documents_are_sorted_unique_and_large_enough(corpus: list[stdlib.Document]) -> None:
    keys = [(document.group, document.name) for document in corpus]
    assert keys == sorted(set(keys))
    assert len({group for group, _ in keys}) > 100
    assert every(len(document.text.encode()) >= stdlib.MIN_BYTES for document in corpus)


def test_group_is_the_top_level_name(corpus: list[stdlib.Document]) -> None:
    groups = {document.name: document.group for document in corpus}
    assert groups["argparse.py"] == "argparse"
    assert groups["json/decoder.py"] == "json"
    assert groups["asyncio/base_events.py"] == "asyncio"


def test_no_tests_no_packages_no_tables(corpus: list[stdlib.Document]) -> None:
    names = {document.name for document in corpus}
    assert not any({"test", "tests", "site-packages", "idle_test"} & set(name.split("/")) for name in names)
    assert not {"encodings/cp1250.py", "encodings/koi8_t.py", "pydoc_data/topics.py", "html/entities.py"} & names
    assert "ast.py" in names


def test_split_is_by_group_and_about_half_of_the_text(corpus: list[stdlib.Document]) -> None:
    pretraining, federated = stdlib.split(corpus)
    assert not {d.group for d in pretraining} & {d.group for d in federated}
    assert sorted(d.name for d in pretraining + federated) == sorted(d.name for d in corpus)
    sizes = [sum(len(d.text) for d in half) for half in (pretraining, federated)]
    assert 0.4 < sizes[0] / sum(sizes) < 0.6
    assert stdlib.split(reversed(corpus))[0] == pretraining[::-1]


def test_tokenizer_round_trip_and_special_ids() -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 1)
    assert 258 < len(tokenizer) <= 300
    for text in ("def g():\n\treturn 'é€😀'\n", "  two  spaces ", ""):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("a")["input_ids"] == tokenizer("a", add_special_tokens=False)["input_ids"]


def test_tokenizer_is_the_same_in_another_process() -> None:
    code = (
        "import hashlib; from fedmoe_ds.data.tokenizer import train_tokenizer; from fedmoe_ds.data import stdlib;"
        "t = train_tokenizer((d.text for d in stdlib.documents()[:40]), 1024);"
        "print(hashlib.sha256(t.backend_tokenizer.to_str().encode()).hexdigest())"
    )
    outputs = {subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout for _ in range(2)}
    assert len(outputs) == 1
