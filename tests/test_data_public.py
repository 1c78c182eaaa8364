"""The public split: the server's alone, stored behind the clients'; hidden labels; images of low resolution.

Legend: N images.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from every import every
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from fedmoe_ds.config.data_form_section import DataFormConfig
from fedmoe_ds.config.data_section import DataConfig, PartitionConfig
from fedmoe_ds.data import FederatedData, Sequences, digits, prepare
from fedmoe_ds.data.dealing import NOBODY, SERVER
from fedmoe_ds.data.forms import Dealt, formed
from fedmoe_ds.data.forms.low_resolution import coarse
from fedmoe_ds.data.holdout import draw_public
from fedmoe_ds.data.tokenizer import train_tokenizer
from fedmoe_ds.errors import UserError

TEXTS = [f"document {i} about {'cats' if i % 3 else 'dogs'} " * (1 + i % 4) for i in range(60)]
NATURAL, IID = PartitionConfig(column="who", clients=4), PartitionConfig(kind="iid", clients=4)
TEXT: dict[str, dict[str, Any]] = {
    "documents of groups": {"template": "text", "partition": NATURAL},
    "documents": {"template": "text", "partition": IID},
    "samples": {"template": "instruction", "partition": IID},
    "few samples": {"template": "instruction", "partition": NATURAL, "max_samples": 3},
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 400)


def owners(data: FederatedData) -> list[Sequences]:
    """Train and hold-out of every client, then the global hold-out."""
    own = [part for client in range(len(data)) for part in (data.train(client), data.holdout(client))]
    return [*own, data.global_holdout()]


def words(part: Sequences) -> list[bytes]:
    if part.pixels is not None:
        return [image.tobytes() for image in part.pixels]
    return [ids.tobytes() for ids in part.input_ids]


@pytest.mark.parametrize("case", TEXT)
def test_the_server_has_its_own_text(case: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = [
        {"who": f"user{i % 5}", "plan": i % 5, "text": text, "instruction": str(i), "output": text}
        for i, text in enumerate(TEXTS)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = DataConfig(source=str(tmp_path / "rows.jsonl"), sequence_length=64, **TEXT[case])
    tiers = "plan" if given.partition == NATURAL else None
    plain, data = (
        prepare(given.model_copy(update={"public": p}), 0, tokenizer, tmp_path, tier_column=tiers) for p in (0.0, 0.3)
    )
    assert (plain.public, data.public) == (False, True) and plain.fingerprint != data.fingerprint
    assert data.names == plain.names and len(data) == 4 and data.label_counts().shape == plain.label_counts().shape
    assert (data.tiers is None) == (tiers is None) and (tiers is None or data.tiers == plain.tiers)
    assert words(data.global_holdout()) == words(plain.global_holdout()), "the hold-out leaves first"
    own = data.train(4)
    lengths = [len(data.train(client)) for client in range(4)]
    assert data.samples.tolist() == lengths and data.train_lengths(4).tolist() == [len(ids) for ids in own.input_ids]
    assert data.train_lengths_of(np.arange(4)).tolist() == [len(ids) for i in range(4) for ids in data.train(i).input_ids]
    if given.template == "instruction":
        everybody = [one for part in owners(data) for one in words(part)]
        assert not set(words(own)) & set(everybody) and len(set(everybody)) == len(everybody)
        if given.max_samples is None:
            assert sorted(everybody + words(own)) == sorted(one for part in owners(plain) for one in words(part))
            assert len(own) == round(0.3 * (60 - len(data.global_holdout())))
    # The same again is found, and read alike.
    again = prepare(given.model_copy(update={"public": 0.3}), 0, tokenizer, tmp_path, tier_column=tiers)
    assert again.path == data.path and words(again.train(4)) == words(own)
    with pytest.raises(AssertionError):
        plain.train(4)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from("abc"), min_size=2, max_size=40), st.floats(0.01, 0.9), st.integers(0, 3))
def test_every_group_keeps_something(strata: list[str], share: float, seed: int) -> None:
    assert len(draw_public(strata, 0.0, seed)) == 0
    if len(strata) == len(set(strata)):
        with pytest.raises(UserError, match=r"^data\.public: .* would empty a group"):
            draw_public(strata, share, seed)
        return
    drawn = draw_public(strata, share, seed).tolist()
    room = len(strata) - len(set(strata))
    assert drawn == sorted(set(drawn)) and len(drawn) == min(max(round(share * len(strata)), 1), room)
    left = [name for place, name in enumerate(strata) if place not in drawn]
    assert set(left) == set(strata)
    assert drawn == draw_public(strata, share, seed).tolist()


def images(**keys: Any) -> DataConfig:
    return DataConfig(source="digits", partition=IID, max_samples=30, **keys)


def test_the_server_s_images_keep_their_resolution(tmp_path: Path) -> None:
    low = DataFormConfig(kind="low-resolution")
    plain, data = (prepare(images(public=0.2, **form), 0, None, tmp_path) for form in ({}, {"form": low}))
    assert words(plain.train(4)) == words(data.train(4)) and len(data.train(4)) > 200
    for before, after in zip(owners(plain), owners(data), strict=True):
        assert before.pixels is not None and after.pixels is not None
        assert np.array_equal(coarse(before.pixels), after.pixels) and not np.array_equal(before.pixels, after.pixels)
        assert np.array_equal(before.labels, after.labels)


def test_hidden_labels_are_not_stored(tmp_path: Path) -> None:
    shown, hidden = (prepare(images(public=0.2, labels=labels), 0, None, tmp_path) for labels in ("shown", "hidden"))
    assert shown.path != hidden.path and shown.fingerprint != hidden.fingerprint
    for client in range(4):
        labels_N, known_N = hidden.train(client).labels, shown.train(client).labels
        assert labels_N is not None and known_N is not None and not labels_N.any() and known_N.any()
        assert words(hidden.train(client)) == words(shown.train(client))
        assert np.array_equal(hidden.holdout(client).labels, shown.holdout(client).labels)
    for part in (FederatedData.global_holdout, lambda data: data.train(4)):
        assert np.array_equal(part(hidden).labels, part(shown).labels)
    assert hidden.distribution == shown.distribution, "the record says what was dealt"


def test_coarse_images() -> None:
    """Means of 2x2 blocks, and between two of them the lines from one to the other."""
    block = np.array([[1.0, 0.0, -1.0, -1.0], [0.5, 0.5, -1.0, -1.0]], dtype=np.float32)[None, None]
    assert coarse(block)[0, 0].tolist() == [[0.5, 0.125, -0.625, -1.0]] * 2
    for size in ((8, 8), (7, 5), (1, 1)):
        flat = np.full((2, 3, *size), 0.3, np.float32)
        assert np.array_equal(coarse(flat), flat)
        assert coarse(flat).shape == flat.shape
    pixels = digits.split()[1].pixels_NCHW
    twice = coarse(np.repeat(np.repeat(pixels, 2, 2), 2, 3))
    corners = twice[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert np.array_equal(corners, pixels[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]), "edges go on"


def test_nobody_s_images_are_coarse_and_the_server_s_are_not() -> None:
    some = digits.split()[1]
    content = Sequences.of_images(some.pixels_NCHW[:6], some.labels_N[:6])
    client_N = np.array([0, SERVER, NOBODY, 1, SERVER, NOBODY])
    made = formed(
        content, Dealt(some.pixels_NCHW[:6], some.labels_N[:6], client_N, 2, 0), DataFormConfig(kind="low-resolution")
    )
    assert made.pixels is not None
    same = [np.array_equal(a, b) for a, b in zip(made.pixels, some.pixels_NCHW[:6], strict=True)]
    assert same == [False, True, False, False, True, False] and every(
        value <= 1 for value in np.abs(made.pixels).max((1, 2, 3))
    )
