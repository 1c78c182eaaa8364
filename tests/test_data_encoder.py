"""Special tokens in texts of users: plain text with every kind of tokenizer, counted, and nothing else changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from every import every
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fedmoe_ds.config.data_section import DataConfig, PartitionConfig
from fedmoe_ds.data.encoder import Encoder, special_tokens
from fedmoe_ds.data.federated import prepare
from fedmoe_ds.data.tokenizer import train_tokenizer
from fedmoe_ds.errors import UserError

NAMES = ["<s>", "</s>", "<unk>", "<|pad|>", "<|endoftext|>", "[SEP]", "<|im_end|>"]
LETTERS = "abcdef </s>|unkpdtxi[SEP]_m<>"
TEXT = [*LETTERS, "a test of sad pets", "the end of text"]


def byte_level() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXT, 300)


def byte_level_whole_words() -> PreTrainedTokenizerFast:
    """A vocabulary that is looked up before merges, as Llama 3 has it, and no splitting before it."""
    pieces = {piece: index for index, piece in enumerate([*NAMES, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=pieces, merges=[], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>", pad_token="<|pad|>")


def merges() -> PreTrainedTokenizerFast:
    """A BPE whose merges lead to the names, as a conversion from SentencePiece may leave them."""
    pieces = [*NAMES, "▁", *sorted(set(LETTERS) - {" "}), "</", "s>", "o", "h"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[("<", "/"), ("s", ">"), ("</", "s>"), ("<", "s>")], unk_token="<unk>")
    )
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


def unigram() -> PreTrainedTokenizerFast:
    """Names are the likeliest pieces of all."""
    pieces = [(name, 0.0) for name in NAMES] + [(letter, -5.0) for letter in ["▁", *sorted(set(LETTERS) - {" "}), "oh"]]
    backend = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


def word_level() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate([*NAMES, *LETTERS.replace(" ", ""), "test", "end"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", pad_token="<|pad|>")


def word_piece() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.train_from_iterator(TEXT, trainers.WordPieceTrainer(vocab_size=90, special_tokens=NAMES, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[SEP]", unk_token="<unk>", pad_token="<|pad|>")


def added() -> PreTrainedTokenizerFast:
    """Special tokens after the vocabulary, with an ordinary added token between them, and one that is matched in capitals."""
    tokenizer = train_tokenizer(TEXT, 300)
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=True), AddedToken("    ", special=False)])
    tokenizer.add_tokens([AddedToken("</s>", special=True, normalized=True, lstrip=True, rstrip=True)])
    return tokenizer


def letter_as_padding() -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer(TEXT, 300)
    tokenizer.pad_token = "!"
    return tokenizer


KINDS: list[Callable[[], PreTrainedTokenizerFast]] = [
    *(byte_level, byte_level_whole_words, merges, unigram, word_level, word_piece, added, letter_as_padding),
]


def usual(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_spells_a_special_token(kind: Callable[[], PreTrainedTokenizerFast]) -> None:
    tokenizer = kind()
    encode, special = Encoder(tokenizer), special_tokens(tokenizer)
    unknown = tokenizer.unk_token_id
    names = [name for name in special.values() if len(name) > 1]
    assert len(names) >= 2
    for name in names:
        forms = [name, f"a{name}b", f"a {name} b", name * 3, f"{name} ", f" {name}", f"{names[0]}{name}", f"test    {name}"]
        for text, (ids, named) in zip(forms, encode(forms), strict=True):
            left = set(ids) & special.keys() - {unknown, *(i for i, n in special.items() if len(n) == 1)}
            assert not left and ids, (text, ids)
            assert named == (ids != usual(tokenizer, text)), text
            assert set(usual(tokenizer, text)) & special.keys(), "the usual call does spell it"
            if kind not in (word_level, word_piece):  # these have no way back
                assert tokenizer.decode(ids).strip() == text.strip(), text


@pytest.mark.parametrize("kind", KINDS)
def test_other_text_is_encoded_as_ever(kind: Callable[[], PreTrainedTokenizerFast]) -> None:
    tokenizer = kind()
    encode, names = Encoder(tokenizer), [name for name in special_tokens(tokenizer).values() if len(name) > 1]

    @settings(max_examples=40, deadline=None, database=None)
    @given(st.lists(st.text(st.sampled_from(LETTERS + "é!"), max_size=30), min_size=1, max_size=4))
    def check(texts: list[str]) -> None:
        plain = [text for text in texts if not any(name in text for name in names)]
        for text, (ids, named) in zip(plain, encode(plain), strict=True):
            assert not named and ids == usual(tokenizer, text), text
            copy = encode._plain[0].encode(text, add_special_tokens=False).ids
            assert copy == ids, "the copy is the tokenizer"

    check()


def test_a_tokenizer_without_a_backend_is_refused() -> None:
    class Slow:
        name_or_path, eos_token_id, backend_tokenizer = "slow", 1, None

    tokenizer: Any = Slow()
    with pytest.raises(UserError, match=r"^foundation\.path: slow: its tokenizer \(Slow\) has no tokenizer\.json"):
        Encoder(tokenizer)


@pytest.mark.parametrize("template", ["text", "instruction", "classification"])
def test_no_end_of_text_inside_a_sample_and_the_count_is_told(template: str, tmp_path: Path) -> None:
    tokenizer = byte_level()
    nasty = "one <|endoftext|> two <|pad|> three"
    plain = {"text": "plain", "instruction": "plain", "output": "plain", "label": "plain"}
    rows = [{**plain, "who": f"u{index % 4}"} for index in range(40)]
    for index in range(0, 40, 4):  # of u0
        rows[index] |= {"text": nasty, "output": nasty}
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(source=str(path), template=template, partition=PartitionConfig(column="who"))
    data = prepare(config, 0, tokenizer, tmp_path / "cache")
    assert data.omissions.total == {"special_names": 10} and data.omissions.clients == {"u0": {"special_names": 10}}
    owners = [*map(data.train, range(4)), *map(data.holdout, range(4)), data.global_holdout()]
    sequences = [ids for owner in owners for ids in owner.input_ids]
    assert not any((ids == tokenizer.pad_token_id).any() for ids in sequences)
    if template == "text":  # documents are packed: one end each
        assert sum(int((ids == tokenizer.eos_token_id).sum()) for ids in sequences) == 40
    else:
        assert every((ids[:-1] != tokenizer.eos_token_id).all() and ids[-1] == tokenizer.eos_token_id for ids in sequences)
