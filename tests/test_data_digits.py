"""Digits as federated data: every partition, hold-outs, nothing of the pre-training part, refusals before anything is read."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits
from transformers import PreTrainedTokenizerFast

from fedmoe_ds.config.data_section import DataConfig, PartitionConfig
from fedmoe_ds.data import FederatedData, ImageInput, Sequences, check_task, digits, prepare
from fedmoe_ds.data.tokenizer import train_tokenizer
from fedmoe_ds.errors import UserError

TOTAL = 1797


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["import this"], 300)


def config(kind: str = "iid", clients: int | None = 5, **data: Any) -> DataConfig:
    partition = PartitionConfig(kind=kind, clients=clients, alpha=data.pop("alpha", 1.0), column=data.pop("column", None))
    return DataConfig(source="digits", partition=partition, **data)


def owners(data: FederatedData) -> list[Sequences]:
    clients = range(len(data.names))
    return [*map(data.train, clients), *map(data.holdout, clients), data.global_holdout()]


def contents(images: Any, labels: Any) -> Counter[tuple[bytes, int]]:
    return Counter((pixels.tobytes(), int(label)) for pixels, label in zip(images, labels, strict=True))


def test_the_split_is_whole_and_disjoint() -> None:
    own, clients = digits.split()
    assert len(own) + len(clients) == TOTAL and 0.2 < len(own) / TOTAL < 0.3
    assert set(own.labels_N) == set(clients.labels_N) == set(range(digits.CLASSES))
    for part in (own, clients):
        assert part.pixels_NCHW.shape == (len(part), *digits.SHAPE) and part.pixels_NCHW.dtype == np.float32
        assert part.pixels_NCHW.min() == -1 and part.pixels_NCHW.max() == 1
    ours = contents(own.pixels_NCHW, own.labels_N) + contents(clients.pixels_NCHW, clients.labels_N)
    raw = load_digits()
    theirs = contents((raw.images / 8 - 1).astype(np.float32)[:, None], raw.target)
    assert ours == theirs
    assert not {pixels.tobytes() for pixels in own.pixels_NCHW} & {pixels.tobytes() for pixels in clients.pixels_NCHW}
    assert own.digest() != clients.digest() and own.digest() == digits.split()[0].digest()


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "quantity", "natural"])
def test_every_client_image_has_one_owner(kind: str, tmp_path: Path) -> None:
    data = prepare(config(kind, None if kind == "natural" else 5), 0, None, tmp_path)
    _, clients = digits.split()
    found: Counter[tuple[bytes, int]] = Counter()
    for owner in owners(data):
        assert owner.pixels is not None and owner.labels is not None and owner.input_ids == owner.loss_mask == []
        found += contents(owner.pixels, owner.labels)
    assert found == contents(clients.pixels_NCHW, clients.labels_N)
    held = sum(len(data.holdout(client)) for client in range(len(data.names)))
    assert held == pytest.approx(0.1 * len(clients), rel=0.1)
    assert len(data.global_holdout()) == pytest.approx(0.05 * len(clients), rel=0.05)
    assert (data.samples == data.train_sequences).all() and (data.samples == data.train_tokens).all()
    assert data.samples.tolist() == [len(data.train(client)) for client in range(len(data.names))]
    assert data.image_shape == digits.SHAPE and data.omissions.total == {} and data.sequence_length == 1
    assert np.sum(data.distribution["counts"]) == len(clients) - len(data.global_holdout())
    sizes = data.samples.tolist()
    if kind == "natural":
        assert data.names == [str(digit) for digit in range(10)]
        for client, name in enumerate(data.names):
            assert set(data.train(client).labels.tolist()) == {int(name)}  # type: ignore[union-attr]
    elif kind == "quantity":
        assert sizes[0] > 2 * sizes[-1]
    elif kind == "iid":
        assert max(sizes) - min(sizes) <= 2


def test_a_dirichlet_partition_skews_the_classes(tmp_path: Path) -> None:
    data = prepare(config("dirichlet", 5, alpha=0.1), 0, None, tmp_path)
    counts = np.array(data.distribution["counts"])
    assert sorted(data.distribution["labels"]) == [str(digit) for digit in range(10)]
    assert (counts.max(1) / counts.sum(1)).mean() > 0.3, "a tenth each would be no skew"


def test_cache_views_and_damage(tmp_path: Path) -> None:
    first = prepare(config(), 0, None, tmp_path)
    stamp = (first.path / "sequences.arrow").stat().st_mtime_ns
    again = prepare(config(sequence_length=64), 0, None, tmp_path)
    assert again.path == first.path, "the length of sequences has no say in images"
    assert (first.path / "sequences.arrow").stat().st_mtime_ns == stamp
    train = again.train(0)
    assert train.pixels is not None and train.labels is not None
    for view in (train.pixels, train.labels):
        assert not view.flags.owndata and not view.flags.writeable
    picked = train.select([2, 0])
    assert picked.pixels is not None and picked.labels is not None and picked.target_count() == len(picked) == 2
    assert np.array_equal(picked.pixels, train.pixels[[2, 0]]) and np.array_equal(picked.labels, train.labels[[2, 0]])
    assert prepare(config(), 1, None, tmp_path).fingerprint != first.fingerprint
    assert prepare(config(max_samples=20), 0, None, tmp_path).samples.tolist() == [18] * 5
    (first.path / "sequences.arrow").write_bytes(b"")
    assert prepare(config(), 0, None, tmp_path).fingerprint == first.fingerprint


def test_a_cache_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(UserError, match=r"^foundation\.cache: .* cannot be written"):
        prepare(config(), 0, None, tmp_path / "cache")


IMAGENET = ImageInput(channels=3, height=224, width=224, classes=1000, positions=197)
DIGITS = ImageInput(channels=1, height=8, width=8, classes=10, positions=17)


@pytest.mark.parametrize(
    ("task", "data", "images", "message"),
    [
        ("causal_lm", config(), None, r"^data\.source: digits: labelled images, and the foundation is a causal language model"),
        ("image_classification", DataConfig(), None, r"^data\.source: stdlib: plain text, and .* needs labelled images"),
        ("image_classification", DataConfig(source="a.jsonl"), DIGITS, r"^data\.source: a\.jsonl: plain text"),
        ("image_classification", config(), IMAGENET, r"images .*\[1, 8, 8\] in 10 classes, .* takes \[3, 224, 224\] in 1000"),
        ("image_classification", config(template="classification"), DIGITS, r"^data\.template: classification: for text only"),
        ("image_classification", config(columns={"text": "x"}), DIGITS, r"^data\.columns: .*: for text only"),
        ("image_classification", config(label_names=["a"]), DIGITS, r"^data\.label_names: \['a'\]: for text only"),
        ("image_classification", config(column="who"), DIGITS, r"^data\.partition\.column: who: no such column"),
    ],
)
def test_what_does_not_fit_is_one_line(task: Any, data: DataConfig, images: ImageInput | None, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check_task(task, data, images)
    assert "\n" not in str(caught.value)


def test_what_fits_passes(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    check_task("image_classification", config(column="label"), DIGITS)
    check_task("causal_lm", DataConfig())
    with pytest.raises(UserError, match=r"^data\.source: digits: labelled images"):
        prepare(config(), 0, tokenizer, tmp_path)
    with pytest.raises(UserError, match=r"^data\.source: stdlib: plain text"):
        prepare(DataConfig(), 0, None, tmp_path)


def test_too_many_clients(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^data\.partition\.clients: 11: more than the 10 groups"):
        prepare(config("natural", 11), 0, None, tmp_path)
    with pytest.raises(UserError, match=r"^data\.partition\.clients: 5000: more clients than the \d+ samples"):
        prepare(config("iid", 5000), 0, None, tmp_path)
