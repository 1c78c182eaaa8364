"""Sources and the whole preparation, through the public API: prepare, find again, open, refuse."""

from __future__ import annotations

import json
import resource
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import numpy as np
import pytest
from every import every
from reference_deal import fingerprint
from transformers import PreTrainedTokenizerFast

from fedmoe_ds.config.data_section import DataConfig, PartitionConfig
from fedmoe_ds.data import stdlib
from fedmoe_ds.data.federated import FederatedData, Sequences, prepare
from fedmoe_ds.data.tokenizer import train_tokenizer
from fedmoe_ds.errors import UserError
from fedmoe_ds.storage import cache

ROWS = [{"text": f"document {i} about {'cats' if i % 3 else 'dogs'} " * (1 + i % 4), "who": f"user{i % 5}"} for i in range(60)]
IID = PartitionConfig(kind="iid", clients=4)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([row["text"] for row in ROWS] + ["import os\nclass A:\n    def f(self):\n"], 400)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a local source touched the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def write_jsonl(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_csv(path: Path) -> Path:
    datasets.Dataset.from_list(ROWS).to_csv(path)
    return path


def write_parquet(path: Path) -> Path:
    datasets.Dataset.from_list(ROWS).to_parquet(path)
    return path


def owners(data: FederatedData) -> list[Sequences]:
    clients = range(len(data.names))
    return [*map(data.train, clients), *map(data.holdout, clients), data.global_holdout()]


def check_invariants(data: FederatedData) -> None:
    assert data.names == sorted(set(data.names))
    assert len(data.global_holdout()) >= 1
    for owner in owners(data):
        for ids, mask in zip(owner.input_ids, owner.loss_mask, strict=True):
            assert ids.dtype == np.int64 and mask.dtype == np.bool_ and ids.shape == mask.shape
            assert 2 <= len(ids) <= data.sequence_length and not mask[0] and mask.any()
    for client in range(len(data.names)):
        train = data.train(client)
        assert len(train) == data.train_sequences[client] == data.samples[client] >= 1
        assert sum(int(mask.sum()) for mask in train.loss_mask) == data.train_tokens[client]
        assert sum(map(len, train.input_ids)) == data.train_rows[client] >= data.train_tokens[client]
    assert np.array(data.distribution["counts"]).shape == (len(data.names), len(data.distribution["labels"]))


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("write", [write_jsonl, write_csv, write_parquet])
def test_local_files(write: Callable[[Path], Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = write(tmp_path / f"rows.{write.__name__.removeprefix('write_')}")
    config = DataConfig(source=str(path), sequence_length=16, partition=PartitionConfig(column="who"))
    data = prepare(config, 0, tokenizer, tmp_path / "cache")
    check_invariants(data)
    assert data.names == [f"user{i}" for i in range(5)]
    total = sum(len(ids) for owner in owners(data) for ids in owner.input_ids)
    expected = sum(len(tokenizer(row["text"])["input_ids"]) + 1 for row in ROWS)
    assert expected - len(data.names) <= total <= expected  # a group may lose one token that would stand alone


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("kind", ["natural", "dirichlet"])
def test_stdlib(kind: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    partition = PartitionConfig(kind=kind, clients=4, alpha=1.0)
    data = prepare(DataConfig(partition=partition, max_samples=60), 0, tokenizer, tmp_path)
    check_invariants(data)
    assert len(data.names) == 4 and data.samples.max() == 54
    if kind == "natural":
        federated = {document.group for document in stdlib.split(stdlib.documents())[1]}
        assert set(data.names) <= federated
        assert np.count_nonzero(data.distribution["counts"]) == 4
    assert len(data.distribution["labels"]) <= 30


def test_text_of_a_natural_client_is_its_own(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = [{"text": f"{who} says {who}", "who": who} for who in ("ann", "bob") for _ in range(40)]
    config = DataConfig(
        source=str(write_jsonl(tmp_path / "a.jsonl", rows)), sequence_length=12, partition=PartitionConfig(column="who")
    )
    data = prepare(config, 0, tokenizer, tmp_path)
    for client, (own, other) in enumerate([("ann", "bob"), ("bob", "ann")]):
        text = "".join(tokenizer.decode(ids) for ids in data.train(client).input_ids + data.holdout(client).input_ids)
        assert own in text and other not in text
    pooled = "".join(map(tokenizer.decode, data.global_holdout().input_ids))
    assert "ann" in pooled and "bob" in pooled


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "quantity"])
def test_no_row_is_lost_or_shared(kind: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = [{"instruction": f"number {i}", "output": str(i), "label": "odd" if i % 2 else "even"} for i in range(97)]
    config = DataConfig(
        source=str(write_jsonl(tmp_path / "a.jsonl", rows)),
        template="instruction",
        partition=PartitionConfig(kind=kind, clients=5, alpha=2.0, column="label"),
    )
    data = prepare(config, 1, tokenizer, tmp_path)
    check_invariants(data)
    seen = [tuple(ids.tolist()) for owner in owners(data) for ids in owner.input_ids]
    assert len(seen) == len(set(seen)) == 97
    assert np.sum(data.distribution["counts"]) == 97 - len(data.global_holdout())
    assert sorted(data.distribution["labels"]) == ["even", "odd"]


def test_classification_labels_show_in_the_distribution(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = [{"text": f"news {i}", "label": i % 40} for i in range(200)]
    config = DataConfig(
        source=str(write_jsonl(tmp_path / "a.jsonl", rows)),
        template="classification",
        label_names=[f"class{i:02d}" for i in range(40)],
        partition=PartitionConfig(kind="dirichlet", clients=3, alpha=1.0),
    )
    data = prepare(config, 0, tokenizer, tmp_path)
    check_invariants(data)
    assert len(data.distribution["labels"]) == 30 and data.distribution["labels"][-1] == "other"
    assert np.sum(data.distribution["counts"]) == 200 - len(data.global_holdout())


def test_same_inputs_same_bits_and_the_cache_is_found(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl")
    config = DataConfig(source=str(source), sequence_length=16, partition=IID)
    first = prepare(config, 0, tokenizer, tmp_path / "one")
    stamp = (first.path / "sequences.arrow").stat().st_mtime_ns
    assert prepare(config, 0, tokenizer, tmp_path / "one").path == first.path
    assert (first.path / "sequences.arrow").stat().st_mtime_ns == stamp
    again = prepare(config, 0, tokenizer, tmp_path / "two")
    assert again.fingerprint == first.fingerprint and again.path.name == first.path.name
    assert prepare(config, 1, tokenizer, tmp_path / "one").fingerprint != first.fingerprint
    source.write_text(source.read_text().replace("document 7 ", "document 8 "))
    assert prepare(config, 0, tokenizer, tmp_path / "one").path != first.path


def test_every_rank_opens_views_of_one_memory_map(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    config = DataConfig(source=str(write_jsonl(tmp_path / "a.jsonl")), sequence_length=16, partition=IID)
    data = prepare(config, 0, tokenizer, tmp_path)
    opened = FederatedData.open(str(data.path))
    assert opened.fingerprint == data.fingerprint and opened.names == data.names
    for ours, theirs in zip(owners(data), owners(opened), strict=True):
        assert every(map(np.array_equal, ours.input_ids, theirs.input_ids))
        assert every(not ids.flags.owndata and not ids.flags.writeable for ids in theirs.input_ids)
        assert every(not mask.flags.owndata for mask in theirs.loss_mask)
    with pytest.raises(UserError, match=r"no readable prepared data .* share"):
        FederatedData.open(tmp_path / "elsewhere")


@pytest.mark.parametrize("name", ["sequences.arrow", "clients.arrow", "header.json"])
def test_damaged_cache_is_reported_and_made_again(name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    config = DataConfig(source=str(write_jsonl(tmp_path / "a.jsonl")), sequence_length=16, partition=IID)
    first = prepare(config, 0, tokenizer, tmp_path / "cache")
    content = (first.path / name).read_bytes()
    for damage in (content[: len(content) // 2], b"", content[:300] + bytes([content[300] ^ 1]) + content[301:]):
        (first.path / name).write_bytes(damage)
        cache.passed_over()
        assert prepare(config, 0, tokenizer, tmp_path / "cache").fingerprint == first.fingerprint
        assert (first.path / name).read_bytes() == content
        assert cache.passed_over() == [f"{first.path} is damaged: made anew"]


def test_a_full_disk_leaves_nothing_behind(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    config = DataConfig(source=str(write_jsonl(tmp_path / "a.jsonl")), sequence_length=16, partition=IID)
    whole = prepare(config, 0, tokenizer, tmp_path / "elsewhere").path
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (0, (whole / "sequences.arrow").stat().st_size // 2, (whole / "sequences.arrow").stat().st_size - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with pytest.raises(UserError, match=r"foundation\.cache: .* cannot be written: .*; free some space"):
                prepare(config, 0, tokenizer, tmp_path / "cache")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert list((tmp_path / "cache").iterdir()) == []
    check_invariants(prepare(config, 0, tokenizer, tmp_path / "cache"))


def test_cache_folder_that_is_a_file(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=r"foundation\.cache: .*a\.jsonl: prepared data cannot be written"):
        prepare(DataConfig(source=str(source), partition=IID), 0, tokenizer, source)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "x"', r"rows\.jsonl:4: not valid JSON"),
        (b"[1, 2]", r"rows\.jsonl:4: a list, not a JSON object"),
        (b'{"text": "\xff"}', r"rows\.jsonl:4: not UTF-8"),
        (b"[" * 100_000, r"rows\.jsonl:4: not valid JSON"),
        (b'{"other": 1}', r"row 3: column 'text' is missing"),
    ],
)
def test_malformed_jsonl_names_file_and_line(
    line: bytes, message: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n{"text": "b"}\n' + line + b"\n")
    with pytest.raises(UserError, match=message):
        prepare(DataConfig(source=str(path), partition=IID), 0, tokenizer, tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text\n" + b'x,"y\nz\n', r"a\.csv:2: not valid CSV \(unexpected end of data\)"),
        ("a.parquet", b"PAR1 no parquet", r"a\.parquet: not readable as parquet"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ["b"]}\n', r"row 2: column 'text' holds \['b'\], not text"),
        ("a.jsonl", b"", r"a\.jsonl: no rows"),
        ("a.xml", b"text", r"a\.xml: unknown kind of file '\.xml'; save .*; use .*\.jsonl, .*\.csv, .*\.parquet"),
    ],
)
def test_unreadable_files(name: str, content: bytes, message: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        prepare(DataConfig(source=str(tmp_path / name), partition=IID), 0, tokenizer, tmp_path / "cache")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["missing.jsonl", "/nowhere/missing.csv", "~/missing.parquet"])
def test_missing_file(source: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.source: .*missing.*: no such file"):
        prepare(DataConfig(source=source), 0, tokenizer, tmp_path)


def test_hub_failure_is_one_line(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # no retries
    with pytest.raises(UserError, match=r"data\.source: nobody/nothing \(split train\): cannot be loaded") as caught:
        prepare(DataConfig(source="nobody/nothing"), 0, tokenizer, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("partition", "message"),
    [
        ({}, r"partition\.column: null: needed for partition\.kind=natural .*text, who"),
        ({"kind": "dirichlet", "clients": 2}, r"partition\.column: null: needed for partition\.kind=dirichlet"),
        ({"column": "whom"}, r"partition\.column: whom: no such column; present: text, who; did you mean 'who'"),
        ({"column": "who", "clients": 9}, r"clients: 9: more than the 5 groups"),
        ({"kind": "iid", "clients": 99}, r"clients: 99: more clients than the 57 samples"),
        ({"kind": "iid"}, r"partition\.clients: null"),
    ],
)
def test_bad_partitions(partition: dict[str, Any], message: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    config = DataConfig(source=str(write_jsonl(tmp_path / "a.jsonl")), partition=PartitionConfig(**partition))
    with pytest.raises(UserError, match=message):
        prepare(config, 0, tokenizer, tmp_path)


def test_an_empty_client_is_named(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = [{"instruction": "a", "output": "b", "who": "ann"}] * 5
    rows += [{"instruction": "a" * 900, "output": "b", "who": "bob"}] * 2
    config = DataConfig(
        source=str(write_jsonl(tmp_path / "a.jsonl", rows)),
        template="instruction",
        partition=PartitionConfig(column="who"),
    )
    with pytest.raises(UserError, match=r"client 'bob': no training sequence is left \(2 samples dropped"):
        prepare(config, 0, tokenizer, tmp_path)
    alone = config.model_copy(update={"partition": PartitionConfig(column="who", clients=1)})
    assert prepare(alone, 0, tokenizer, tmp_path).names == ["ann"]


def test_a_client_with_one_sequence_has_no_holdout(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = [{"text": "word " * 400, "who": "ann"}, {"text": "word", "who": "bob"}]
    config = DataConfig(
        source=str(write_jsonl(tmp_path / "a.jsonl", rows)), sequence_length=16, partition=PartitionConfig(column="who")
    )
    data = prepare(config, 0, tokenizer, tmp_path)
    assert data.names == ["ann", "bob"] and data.samples[1] == 1
    assert len(data.holdout(1)) == 0 and len(data.holdout(0)) >= 1


def test_nothing_to_hold_out(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "word", "who": "bob"}])
    config = DataConfig(source=str(source), partition=PartitionConfig(column="who"))
    with pytest.raises(UserError, match=r"global_holdout: 0\.05: the data have 1 sample"):
        prepare(config, 0, tokenizer, tmp_path)


def test_progress_bars_are_left_as_they_were(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = DataConfig(source=str(write_jsonl(tmp_path / "a.jsonl")), sequence_length=16, partition=IID)
    datasets.enable_progress_bars()
    prepare(config, 0, tokenizer, tmp_path)
    assert not datasets.are_progress_bars_disabled()
    assert capfd.readouterr() == ("", "")


def test_a_column_gives_every_client_its_tier(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = [{**row, "plan": 4 if row["who"] < "user3" else 2} for row in ROWS]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    config = DataConfig(source=str(source), partition=PartitionConfig(column="who", clients=4), sequence_length=32)
    data = prepare(config, 0, tokenizer, tmp_path, tier_column="plan")
    assert data.tiers is not None and len(data.tiers) == 4
    assert every(tier == ("4" if name < "user3" else "2") for name, tier in zip(data.names, data.tiers, strict=True))
    plain = prepare(config, 0, tokenizer, tmp_path)
    assert plain.tiers is None and plain.fingerprint == data.fingerprint, "tiers change no sequence"
    rows[5]["plan"] = 1
    write_jsonl(source, rows)
    where = r"^federation\.tier_column: "
    with pytest.raises(UserError, match=where + r"plan: client user0 has rows of tiers '4' and '1'; give it one of them"):
        prepare(config, 0, tokenizer, tmp_path, tier_column="plan")
    with pytest.raises(UserError, match=where + r"plans: no such column; .*did you mean 'plan'"):
        prepare(config, 0, tokenizer, tmp_path, tier_column="plans")
    with pytest.raises(UserError, match=where + r"plan: needs data\.partition\.kind=natural"):
        prepare(config.model_copy(update={"partition": IID}), 0, tokenizer, tmp_path, tier_column="plan")


def test_seeds_share_the_sequences_and_store_their_own_deal(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = [{"instruction": f"say {i}", "output": f"document {i} " * 5} for i in range(60)]
    config = DataConfig(source=str(write_jsonl(tmp_path / "rows.jsonl", rows)), template="instruction", partition=IID)
    place = tmp_path / "cache"
    first, second = (prepare(config, seed, tokenizer, place) for seed in (0, 1))
    (units,) = place.glob("units-*")
    assert len(list(place.iterdir())) == 3 and first.fingerprint != second.fingerprint

    def content(data: FederatedData) -> list[bytes]:
        return [
            ids.tobytes() + mask.tobytes()
            for owner in owners(data)
            for ids, mask in zip(owner.input_ids, owner.loss_mask, strict=True)
        ]

    assert sorted(content(first)) == sorted(content(second)) and len(content(first)) == 60
    assert fingerprint([first.train(0)]) != fingerprint([first.train(1)])
    # What the deal says is the content's digest, wherever that is stored: a copy has the same.
    order = [owner for client in range(4) for owner in (first.train(client), first.holdout(client))]
    assert fingerprint([*order, first.global_holdout()]) == first.fingerprint
    before = content(first)
    (units / "sequences.arrow").write_bytes(b"damaged")
    again = prepare(config, 0, tokenizer, place)
    assert content(again) == before and "is damaged" in (cache.line([cache.passed_over()]) or "")
    few = prepare(config.model_copy(update={"max_samples": 3}), 0, tokenizer, tmp_path / "few")
    assert len(few) == 4 and not list((tmp_path / "few").glob("units-*")), "a few of many are copied"
    check_invariants(again)
    check_invariants(few)
