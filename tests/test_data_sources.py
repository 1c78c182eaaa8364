"""Sources: every layout as the tool that writes it writes it, read to the same rows; and the bad ones in one line each."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from fedmoe_ds.config import Config, load_config
from fedmoe_ds.config.data_section import DataConfig, PartitionConfig
from fedmoe_ds.config.yaml12 import parse_yaml
from fedmoe_ds.data import federated
from fedmoe_ds.data.federated import FederatedData, prepare
from fedmoe_ds.data.readers import COMPRESSIONS, READERS, DataFile, data_file
from fedmoe_ds.data.sources import FileSource, open_source
from fedmoe_ds.data.templates import columns
from fedmoe_ds.data.tokenizer import train_tokenizer
from fedmoe_ds.errors import UserError

WHO = ("ann", "bob", "cem")
ROWS = [{"text": f"number {i} by {WHO[i % 3]} café", "who": WHO[i % 3]} for i in range(60)]
SHARED = PartitionConfig(kind="iid", clients=2)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([str(row["text"]) for row in ROWS] * 2, 300)


def zstd(content: bytes) -> bytes:
    packed = pa.BufferOutputStream()
    with pa.CompressedOutputStream(packed, "zstd") as stream:
        stream.write(content)
    return packed.getvalue().to_pybytes()


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def of(who: str) -> list[dict[str, Any]]:
    return [row for row in ROWS if row["who"] == who]


def frame(rows: list[dict[str, Any]] = ROWS) -> Any:
    return pd.DataFrame(rows)


def nested(rows: list[dict[str, Any]] = ROWS) -> list[dict[str, Any]]:
    return [{"row": {"body": {"text": row["text"]}}, "meta": {"user": row["who"]}} for row in rows]


def learnt(data: FederatedData, tokenizer: PreTrainedTokenizerFast) -> str:
    """All that any owner has, as text."""
    owners = [*(data.train(c) for c in range(len(data))), *(data.holdout(c) for c in range(len(data))), data.global_holdout()]
    return "".join(tokenizer.decode(ids) for owner in owners for ids in owner.input_ids)


# The same rows in every layout -------------------------------------------------------------------------------------------


def write_folder(path: Path) -> None:
    """One file per client, of three kinds."""
    path.mkdir()
    (path / "ann.jsonl").write_bytes(jsonl([{"text": row["text"]} for row in of("ann")]))
    frame(of("bob"))[["text"]].to_csv(path / "bob.csv", index=False)
    frame(of("cem"))[["text"]].to_parquet(path / "cem.parquet")


def write_texts(path: Path) -> None:
    """A sub-folder of text files per client."""
    for index, row in enumerate(ROWS):
        (path / row["who"]).mkdir(parents=True, exist_ok=True)
        (path / row["who"] / f"note.{index}.txt").write_text(row["text"], encoding="utf-8")


def write_shards(path: Path) -> None:
    path.mkdir()
    (path / "b.jsonl").write_bytes(jsonl(ROWS[30:]))
    (path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(ROWS[:30])))


def write_dict(path: Path) -> None:
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS), "dev": datasets.Dataset.from_list(ROWS[:3])}).save_to_disk(
        path
    )


def write_excel(path: Path) -> None:
    frame().to_csv(path, sep=";", encoding="cp1252", index=False, lineterminator="\r\n", quoting=csv.QUOTE_ALL)


DOTTED: dict[str, Any] = {"columns": {"text": "row.body.text"}, "partition": PartitionConfig(column="meta.user")}
FOLDER: dict[str, Any] = {"partition": PartitionConfig()}
LAYOUTS: dict[str, tuple[str, Callable[[Path], object], dict[str, Any]]] = {
    "pandas records": ("a.json", lambda path: frame().to_json(path, orient="records"), {}),
    "pandas records, indented": ("a.json", lambda path: frame().to_json(path, orient="records", indent=2), {}),
    "json.dump": ("a.json", lambda path: path.write_text(json.dumps(ROWS, ensure_ascii=False), encoding="utf-8"), {}),
    "lines named .json": ("a.json", lambda path: datasets.Dataset.from_list(ROWS).to_json(path), {}),
    "ndjson": ("a.ndjson", lambda path: frame().to_json(path, orient="records", lines=True), {}),
    "gzip": ("a.jsonl.gz", lambda path: path.write_bytes(gzip.compress(jsonl(ROWS))), {}),
    # pigz and `cat` leave several members in one file.
    "gzip members": (
        "a.jsonl.gz",
        lambda path: path.write_bytes(gzip.compress(jsonl(ROWS[:9])) + gzip.compress(jsonl(ROWS[9:]))),
        {},
    ),
    "zstd": ("a.jsonl.zst", lambda path: path.write_bytes(zstd(jsonl(ROWS))), {}),
    "gzip json": ("a.json.gz", lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())), {}),
    "gzip csv": ("a.csv.gz", lambda path: frame().to_csv(path, index=False), {}),
    "bzip2 csv": ("A.CSV.BZ2", lambda path: path.write_bytes(bz2.compress(frame().to_csv(index=False).encode())), {}),
    "tsv": ("a.tsv", lambda path: frame().to_csv(path, sep="\t", index=False), {}),
    "Excel csv": ("a.csv", write_excel, {"separator": ";", "encoding": "cp1252"}),
    "Excel Unicode text": (
        "a.tsv",
        lambda path: path.write_bytes(frame().to_csv(sep="\t", index=False).encode("utf-16")),
        {"encoding": "utf-16"},
    ),
    "folder of clients": ("clients", write_folder, FOLDER),
    "folders of texts": ("clients", write_texts, FOLDER),
    "glob": ("shards/*", lambda path: write_shards(path.parent), {}),
    "Dataset": ("saved", lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(path), {}),
    "DatasetDict": ("saved", write_dict, {}),
    "Arrow stream": (
        "saved/data-00000-of-00001.arrow",
        lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(path.parent),
        {},
    ),
    "Feather": ("a.arrow", lambda path: pyarrow.feather.write_feather(frame(), path), {}),
    "nested lines": ("a.jsonl", lambda path: path.write_bytes(jsonl(nested())), DOTTED),
    "nested array": ("a.json", lambda path: path.write_text(json.dumps(nested())), DOTTED),
    "nested parquet": ("a.parquet", lambda path: pq.write_table(pa.Table.from_pylist(nested()), path), DOTTED),
    "nested Dataset": ("saved", lambda path: datasets.Dataset.from_list(nested()).save_to_disk(path), DOTTED),
    "nested stream": (
        "s/data-00000-of-00001.arrow",
        lambda path: datasets.Dataset.from_list(nested()).save_to_disk(path.parent),
        DOTTED,
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_clients(layout: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    name, write, keys = LAYOUTS[layout]
    write(tmp_path / name)
    config = DataConfig(source=str(tmp_path / name), sequence_length=12, **{"partition": PartitionConfig(column="who"), **keys})
    data = prepare(config, 0, tokenizer, tmp_path / "cache")
    assert data.names == list(WHO) and data.omissions.rows == len(ROWS)
    # In the order of the files' names: then every bit is the same.
    order = {"folder of clients": lambda pair: pair[1]["who"], "folders of texts": lambda pair: (pair[1]["who"], str(pair[0]))}
    rows = [row for _, row in sorted(enumerate(ROWS), key=order.get(layout, lambda pair: pair[0]))]
    plain = tmp_path / "plain.jsonl"
    plain.write_bytes(jsonl(rows))
    config = DataConfig(source=str(plain), sequence_length=12, partition=PartitionConfig(column="who"))
    assert data.fingerprint == prepare(config, 0, tokenizer, tmp_path / "cache").fingerprint


def test_a_list_is_read_in_its_order(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    write_shards(tmp_path / "shards")
    names = [str(tmp_path / "shards" / "a.jsonl.gz"), str(tmp_path / "shards" / "b*")]
    rows = list(open_source(DataConfig(source=names)).table({"text"})["text"])
    assert rows == [row["text"] for row in ROWS]
    assert list(open_source(DataConfig(source=names[::-1])).table({"text"})["text"]) == rows[30:] + rows[:30]
    assert open_source(DataConfig(source=names)).digest() != open_source(DataConfig(source=names[::-1])).digest()
    path = tmp_path / "c.yaml"
    path.write_text(f"data: {{source: [{names[0]}, '{names[1]}']}}\n")
    assert load_config(path, []).data.source == names


# Properties ---------------------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
VALUE = st.one_of(
    TEXT, st.none(), st.integers(), st.booleans(), st.lists(TEXT, max_size=2), st.dictionaries(TEXT, TEXT, max_size=2)
)
TABLES = st.lists(st.dictionaries(st.sampled_from(["text", "a.b", "a", "x y"]), VALUE, max_size=3), min_size=1, max_size=6)
WANTED = ("text", "a.b", "x y")


def read(path: Path, **keys: Any) -> list[dict[str, Any]]:
    table = FileSource(DataFile(path, **keys)).table(WANTED)
    return [dict(zip(table.columns, values, strict=True)) for values in zip(*table.columns.values(), strict=True)]


@settings(max_examples=60, deadline=None)
@given(rows=TABLES, indent=st.sampled_from([None, 0, 3]), escaped=st.booleans(), piece=st.integers(1, 40))
def test_json_in_any_coat_is_what_its_lines_are(
    rows: list[dict[str, Any]], indent: int | None, escaped: bool, piece: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("json")
    lines, array = jsonl(rows), json.dumps(rows, indent=indent, ensure_ascii=escaped).encode()
    contents = {
        "a.jsonl": lines,
        "a.json": array,
        "a.ndjson.zst": zstd(lines),
        "a.jsonl.gz": gzip.compress(lines),
        "b.json.gz": gzip.compress(array),
        "b.json.bz2": bz2.compress(b"\xef\xbb\xbf" + array),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    expected = read(folder / "a.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        # Small pieces: values are cut anywhere.
        patch.setattr(data_file, "_PIECE", piece)
        assert [repr(read(folder / name)) for name in contents] == [repr(expected)] * len(contents)
        (folder / "u.json").write_bytes(array.decode().encode("utf-16"))
        assert repr(read(folder / "u.json", encoding="utf-16")) == repr(expected)


def strictly(content: bytes) -> list[dict[str, Any]] | None:
    """The rows of an array as Python's parser reads it in one go, or None where it is no strict JSON."""

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(found)) < len(found):
            raise ValueError("key twice")
        return dict(found)

    def constant(word: str) -> Any:
        raise ValueError(word)

    def number(word: str) -> float:
        if math.isinf(float(word)):
            raise ValueError(word)
        return float(word)

    hooks: dict[str, Any] = {"object_pairs_hook": pairs, "parse_constant": constant, "parse_float": number}
    try:
        rows = json.loads(content.decode("utf-8-sig"), **hooks)
        if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
            return None
        json.dumps([row.get("text") for row in rows], ensure_ascii=False).encode()
    except ValueError:
        return None
    return [{"text": row.get("text")} for row in rows] if any("text" in row for row in rows) else []


@example(rows=[{"b": 1000000}], place=0.5, put=b"1e", cut=0, piece=1)  # 1e1000000, which no float holds
@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(st.dictionaries(st.sampled_from(["text", "b"]), VALUE, max_size=2), min_size=1, max_size=4),
    place=st.floats(0, 1),
    put=st.sampled_from([b"", b'"', b",", b"]", b"}", b"{", b"\\", b"\n", b"\xff", b"NaN", b"1e", b"tru", b"[" * 300]),
    cut=st.sampled_from([0, 1, 4, 99]),
    piece=st.integers(1, 40),
)
def test_a_spoiled_array_is_read_as_by_a_plain_parser_or_not_at_all(
    rows: list[dict[str, Any]], place: float, put: bytes, cut: int, piece: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = json.dumps(rows, indent=1).encode()
    at = int(place * len(content))
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_bytes(content[:at] + put + content[at + cut :])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_file, "_PIECE", piece)
        try:
            table = FileSource(DataFile(path)).table({"text"})
            found = [{"text": value} for value in table["text"]] if "text" in table.columns else []
        except UserError as error:
            assert re.search(r"a\.json(:\d+)?: ", str(error)) and "\n" not in str(error)
            assert strictly(path.read_bytes()) is None
        else:
            assert repr(found) == repr(strictly(path.read_bytes()))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=5),
    separator=st.sampled_from([",", ";", "\t", "|", " "]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-7", "gb18030"]),
)
def test_csv_with_any_separator_and_encoding(
    rows: list[tuple[str, str]], separator: str, encoding: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path, text = tmp_path_factory.mktemp("csv") / "a.csv", io.StringIO(newline="")
    writer = csv.writer(text, delimiter=separator, quoting=csv.QUOTE_ALL)
    writer.writerows([("text", "a.b"), *rows])
    path.write_bytes(text.getvalue().encode(encoding))
    assert read(path, separator=separator, encoding=encoding) == [{"text": a, "a.b": b} for a, b in rows]


def test_a_literal_column_wins_over_a_path(tmp_path: Path) -> None:
    rows = [{"a.b": "literal", "a": {"b": "inner"}}, {"a": {"b": "inner"}}]
    (tmp_path / "a.jsonl").write_bytes(jsonl(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert read(tmp_path / name) == [{"a.b": "literal"}, {"a.b": None}], name
    # A part that is missing on the way is a missing value, and so is one that is no object.
    rows = [{"a": {"b": "inner"}}, {"a": None}, {}, {"a": {}}]
    (tmp_path / "a.jsonl").write_bytes(jsonl([*rows, {"a": "text"}, {"a": [{"b": "c"}]}]))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [{"a.b": "inner"}, *[{"a.b": None}] * 3]
    assert read(tmp_path / "a.jsonl") == [{"a.b": "inner"}, *[{"a.b": None}] * 5]


def test_lists_of_messages_are_the_same_from_every_kind(tmp_path: Path) -> None:
    rows = [{"text": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}, {"text": []}]
    (tmp_path / "a.jsonl").write_bytes(jsonl(rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    saved = datasets.Dataset.from_list(rows)
    saved.to_parquet(tmp_path / "a.parquet")
    saved.save_to_disk(tmp_path / "saved")
    found = [read(tmp_path / name) for name in ("a.jsonl", "a.json", "a.parquet", "saved/data-00000-of-00001.arrow")]
    found += [[{"text": value} for value in open_source(DataConfig(source=str(tmp_path / "saved"))).table({"text"})["text"]]]
    assert found == [rows] * 5


def test_class_labels_inside_of_a_column_have_their_words(tmp_path: Path) -> None:
    label = datasets.ClassLabel(names=["no", "yes"])
    rows = datasets.Dataset.from_dict({"m": [{"label": 1}, {"label": 0}]}, datasets.Features({"m": {"label": label}}))
    rows.save_to_disk(tmp_path / "saved")
    rows.to_parquet(tmp_path / "a.parquet")
    for name in ("saved", "a.parquet"):
        table = open_source(DataConfig(source=str(tmp_path / name))).table({"m.label"})
        assert table.classes == {"m.label": ["no", "yes"]} and list(table["m.label"]) == [1, 0], name


# Validation ---------------------------------------------------------------------------------------------------------------

HELD = [{"text": f"held {i} out", "who": "nobody"} for i in range(7)]
EMPTY = {"text": " ", "who": "nobody"}


@pytest.mark.parametrize("kind", ["file", "list", "split"])
def test_a_validation_source_is_the_hold_out(kind: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    source, validation = tmp_path / "a.jsonl", tmp_path / "v.json"
    source.write_bytes(jsonl(ROWS))
    validation.write_text(json.dumps([*HELD, EMPTY]))
    named: Any = str(validation)
    if kind == "list":
        (tmp_path / "w.jsonl").write_bytes(jsonl([EMPTY, *HELD[4:]]))
        validation.write_text(json.dumps(HELD[:4]))
        named = [str(validation), str(tmp_path / "w*")]
    elif kind == "split":
        source, named = tmp_path / "saved", "dev"
        held = datasets.Dataset.from_list([*HELD, EMPTY])
        datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS), "dev": held}).save_to_disk(source)
    pairs: dict[str, Any] = {"template": "instruction", "columns": {"instruction": "who", "output": "text"}}
    config = DataConfig(source=str(source), validation=named, partition=PartitionConfig(column="who"), **pairs)
    data = prepare(config, 0, tokenizer, tmp_path / "cache")
    held_text = "".join(map(tokenizer.decode, data.global_holdout().input_ids))
    found = re.findall(r"held \d", held_text)
    assert found != sorted(found) == [f"held {i}" for i in range(7)] and "number" not in held_text
    assert data.names == list(WHO) and "held" not in learnt(data, tokenizer).replace(held_text, "")
    # Nothing of the source was held out for everybody: every row has a client.
    assert len(re.findall("number", learnt(data, tokenizer))) == len(ROWS)
    assert data.omissions.rows == len(ROWS) + 8 and data.omissions.total == {"empty": 1} and data.omissions.clients == {}
    drawn = prepare(config.model_copy(update={"validation": None}), 0, tokenizer, tmp_path / "cache")
    assert drawn.path != data.path
    if kind == "file":  # its content is part of the content
        validation.write_text(json.dumps(HELD[1:]))
        assert prepare(config, 0, tokenizer, tmp_path / "cache").path != data.path


def test_keys_that_say_nothing_new_leave_old_caches_alone(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[Any] = []
    digest = federated.tree_sha256
    monkeypatch.setattr(federated, "tree_sha256", lambda tree: keys.append(tree) or digest(tree))
    (tmp_path / "a.csv").write_text(frame().to_csv(index=False))
    config = DataConfig(source=str(tmp_path / "a.csv"), partition=SHARED, sequence_length=12)
    prepare(config, 0, tokenizer, tmp_path)
    prepare(config.model_copy(update={"encoding": "latin-1"}), 0, tokenizer, tmp_path)
    first = {"template", "columns", "label_names", "sequence_length", "max_samples", "holdout", "global_holdout", "partition"}
    assert [set(key["config"]) - first for key in keys] == [set(), {"encoding"}] and first <= set(keys[0]["config"])
    assert keys[0]["kind"] == "FileSource" and "validation" not in keys[0]
    # The same bytes in another kind of file are other rows.
    (tmp_path / "b.tsv").write_bytes((tmp_path / "a.csv").read_bytes())
    assert open_source(DataConfig(source=str(tmp_path / "b.tsv"))).digest() != keys[0]["source"]


# Mistakes -----------------------------------------------------------------------------------------------------------------


def made(path: Path, **contents: bytes) -> None:
    for name, content in contents.items():
        file = path / name.replace("__", "/").replace("_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("__"):
            file.mkdir()
        else:
            file.write_bytes(content)


LINES = jsonl(ROWS)
PACKED = gzip.compress(LINES)
GOOD = b'{"text": "a"}\n'
# files (`_` is a dot, `__` the end of a folder's name), keys of the configuration (`{}` is the folder), the line
MISTAKES: dict[str, tuple[dict[str, bytes], dict[str, Any], str]] = {
    "object of arrays": (
        {"a_json": b'{"text": ["a", "b"]}'},
        {},
        r"a\.json:1: an object, not an array of objects \(pandas: to_json",
    ),
    "pandas' default": ({"a_json": frame().to_json().encode()}, {}, r"a\.json:1: an object, not an array of objects"),
    "a number": ({"a_json": b" 3 "}, {}, r"a\.json:1: a single value, not an array of objects"),
    "array of texts": ({"a_json": b'["a", "b"]'}, {}, r"a\.json:1: no JSON object where one of the array should begin"),
    "array cut off": ({"a_json": b'[{"text": "a"},\n {"text": "b'}, {}, r"a\.json:2: not valid JSON \(Unterminated string"),
    "a later object": (
        {"a_json": b'[{"text": "a"},\n\n {"text": "b",\n "c": tru}]'},
        {},
        r"a\.json:4: not valid JSON \(Expecting value",
    ),
    "array without end": ({"a_json": b'[{"text": "a"}'}, {}, r"a\.json:1: not valid JSON \(neither a comma nor"),
    "comma too much": ({"a_json": b'[{"text": "a"},\n]'}, {}, r"a\.json:2: no JSON object where"),
    "text after an array": ({"a_json": b"[] 1"}, {}, r"a\.json:1: not valid JSON \(more text after the array's end"),
    "key twice": ({"a_json": b'[\n{"a": 1, "a": 2}]'}, {}, r"a\.json:2: not valid JSON \(key 'a' occurs twice\)"),
    "NaN": ({"a_json": b'[{"a": NaN}]'}, {}, r"a\.json:1: not valid JSON \(NaN is no JSON number\)"),
    "deep": (
        {"a_json": b"[" + b'{"a":' * 200 + b"1" + b"}" * 200 + b"]"},
        {},
        r"a\.json:1: not valid JSON \(nested deeper than 64",
    ),
    "half a pair": ({"a_json": b'[{"text": "\\ud800"}]'}, {}, r"a\.json:1: column 'text' holds half of a surrogate pair"),
    "half a pair inside": (
        {"a_jsonl": b'{"text": [{"a": "\\ud800"}]}'},
        {},
        r"a\.jsonl:1: column 'text' holds half of a surrogate",
    ),
    "empty array": ({"a_json": b"[ ]"}, {}, r"a\.json: no rows"),
    "empty": ({"a_json": b" "}, {}, r"a\.json: no rows"),
    "latin-1 array": (
        {"a_json": '[{"text":\n"é"}]'.encode("latin-1")},
        {},
        r"a\.json:2: not UTF-8 text; .* name its encoding in data",
    ),
    "cut archive": ({"a_jsonl_gz": PACKED[:-9]}, {}, r"a\.jsonl\.gz: a damaged or unfinished archive \(OSError: Truncated"),
    "bad checksum": (
        {"a_jsonl_gz": PACKED[:-8] + b"xxxx" + PACKED[-4:]},
        {},
        r"a\.jsonl\.gz: a damaged .*incorrect data check",
    ),
    "no archive": ({"a_jsonl_gz": LINES}, {}, r"a\.jsonl\.gz: a damaged or unfinished archive"),
    "cut zstd": ({"a_csv_zst": zstd(LINES)[:-5]}, {}, r"a\.csv\.zst: a damaged or unfinished archive"),
    "no zstd": ({"a_json_zst": b"[]"}, {}, r"a\.json\.zst: a damaged or unfinished archive"),
    "packed parquet": (
        {"a_parquet_gz": b""},
        {},
        r"a\.parquet\.gz: unknown kind of file '\.parquet\.gz'; use files that end in \.jsonl",
    ),
    "no Arrow": ({"a_arrow": b"ARROW1 nothing"}, {}, r"a\.arrow: not readable as Arrow: .*; mend the file"),
    "semicolons": ({"a_csv": b"text;who\na;b\n"}, {}, r"a\.csv:1: a single column, 'text;who', .* data\.separator=';'"),
    "no codec": ({"a_csv": b"text\na\n"}, {"encoding": "latin-99"}, r"^data\.encoding: latin-99: no text encoding of Python"),
    "no text codec": ({"a_csv": b"text\na\n"}, {"encoding": "rot13"}, r"^data\.encoding: rot13: no text encoding of Python"),
    "wrong codec": ({"a_csv": b"text\n\na\x81\n"}, {"encoding": "cp1252"}, r"a\.csv:3: not cp1252 text; name the encoding"),
    "no UTF-16": ({"a_csv": b"text\na\n"}, {"encoding": "utf-16"}, r"a\.csv:1: not utf-16 text"),
    "half UTF-16": ({"a_csv": "text\nab".encode("utf-16")[:-1]}, {"encoding": "utf-16"}, r"a\.csv:2: not utf-16 text"),
    "separator of JSONL": (
        {"a_jsonl": LINES},
        {"separator": ";"},
        r"^data\.separator: ;: without effect: none .* \.csv, \.tsv; drop",
    ),
    "encoding of stdlib": ({}, {"source": "stdlib", "encoding": "cp1252"}, r"^data\.encoding: cp1252: without effect"),
    "split of stdlib": ({}, {"source": "stdlib", "split": "test"}, r"^data\.split: test: stdlib has no splits; drop the key"),
    "splits of a file": ({"a_jsonl": LINES}, {"split": "test"}, r"^data\.split: test: .*a\.jsonl has no splits; drop the key"),
    "separator of nothing": ({"a_csv": b"text\na\n"}, {"separator": '"'}, r"^data\.separator: '\"': separates no fields"),
    "Excel": ({"a_xlsx": b"PK"}, {}, r"a\.xlsx: unknown kind of file '\.xlsx'; save it as CSV or Parquet; use files that"),
    "tar": ({"a_tar_gz": PACKED}, {}, r"a\.tar\.gz: unknown kind of file '\.tar\.gz'; unpack it; use files that end in"),
    "no file of a kind": (
        {},
        {"source": "a.xlsx"},
        r"^data\.source: a\.xlsx: no such file or folder, or of an unknown kind '\.xlsx'",
    ),
    "no group": (
        {"d__a_jsonl": LINES, "d__b_jsonl": GOOD},
        {"source": "{}/d/*", "partition": {"column": "who"}},
        r"^data\.partition\.column: who: row 1 of .*b\.jsonl holds None, no group's name",
    ),
    "no match": ({}, {"source": "{}/*.jsonl"}, r"^data\.source: .*/\*\.jsonl: no file matches; mend the pattern"),
    "match of no kind": ({"d__a_jsonl": GOOD, "d__b_md": b""}, {"source": "{}/d/*"}, r"d/b\.md: unknown kind of file '\.md'"),
    "match of a folder": ({"d__e__a_jsonl": GOOD}, {"source": "{}/d/*"}, r"d/e: no regular file"),
    "list of nothing": (
        {"a_jsonl": GOOD},
        {"source": ["{}/a.jsonl", "org/name"]},
        r"^data\.source: org/name: neither a file nor a glob",
    ),
    "list with a folder": ({"d__a_jsonl": GOOD}, {"source": ["{}/d"]}, r"^data\.source: .*/d: neither a file nor a glob"),
    "list with a gap": ({}, {"source": ["{}/no.jsonl"]}, r"no\.jsonl: no such file"),
    "twice": ({"a_jsonl": GOOD}, {"source": ["{}/a.jsonl", "{}/*.jsonl"]}, r"a\.jsonl: named twice"),
    "empty folder": ({"d__": b""}, {"source": "{}/d"}, r"/d: an empty folder; give one with a file for each client"),
    "empty client": ({"d__e__": b""}, {"source": "{}/d"}, r"d/e: an empty folder, where a client's files should be"),
    "readme": (
        {"d__a_jsonl": GOOD, "d__README_md": b"x"},
        {"source": "{}/d"},
        r"README\.md: unknown kind .* every file is a client's",
    ),
    "hidden": ({"d__a_jsonl": GOOD, "d___DS": b"x"}, {"source": "{}/d"}, r"\.DS: hidden; in a folder every file is a client's"),
    "two files of a client": (
        {"d__a_csv": b"text\nb\n", "d__a_jsonl": GOOD},
        {"source": "{}/d"},
        r"a\.jsonl: client 'a', as .*a\.csv is",
    ),
    "file and folder": (
        {"d__a_csv": b"text\nb\n", "d__a__b_csv": b"text\nb\n"},
        {"source": "{}/d"},
        r": client 'a', as .* is; rename",
    ),
    "deeper": ({"d__a__b__c_csv": b"text\nb\n"}, {"source": "{}/d"}, r"a/b: no regular file"),
    "client in a client": (
        {"d__a_csv": b"text,client\nb,c\n"},
        {"source": "{}/d"},
        r"a\.csv: has a column 'client', .*partition\.column=client",
    ),
    "other columns": (
        {"d__a_csv": b"text\nb\n", "d__b_csv": b"txt\nb\n"},
        {"source": "{}/d"},
        r"b\.csv: no column 'text', which .*a\.csv has; present: txt",
    ),
    "client without rows": ({"d__a_csv": b"text\nb\n", "d__b_csv": b"text\n"}, {"source": "{}/d"}, r"b\.csv: no rows"),
    "bad row of a file": (
        {"d__a_jsonl": GOOD, "d__b_jsonl": GOOD + b'{"text": 3}'},
        {"source": "{}/d"},
        r"row 2 of .*b\.jsonl: column 'text' holds 3",
    ),
    "path to nowhere": (
        {"a_jsonl": b'{"a": {"b": "c"}}'},
        {"columns": {"text": "a.c"}},
        r"^data\.columns\.text: a\.c: no such column; present: a",
    ),
    "other validation": (
        {"a_jsonl": LINES, "v_csv": b"txt\na\n"},
        {"validation": "{}/v.csv"},
        r"^data\.validation: .*v\.csv: data\.columns: text: no such",
    ),
    "empty validation": (
        {"a_jsonl": LINES, "v_csv": b'text\n""\n'},
        {"validation": "{}/v.csv"},
        r"^data\.validation: .*v\.csv: all 1 samples are empty",
    ),
    "trained and held out": (
        {"d__a_jsonl": GOOD, "d__dev_jsonl": GOOD},
        {"source": "{}/d/*.jsonl", "validation": "{}/d/dev.jsonl"},
        r"^data\.validation: .*dev\.jsonl: clients train on this file as well; take it out of data\.source",
    ),
    "no validation": ({"a_jsonl": LINES}, {"validation": "{}/v.csv"}, r"^data\.validation: .*v\.csv: no such file"),
    "split of a file": (
        {"a_jsonl": LINES},
        {"validation": "test"},
        r"^data\.validation: test: no file, and only a hub data set",
    ),
    "broken validation": (
        {"a_jsonl": LINES, "v_json": b"["},
        {"validation": "{}/v.json"},
        r"^data\.validation: .*v\.json:1: no JSON object",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(case: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    contents, keys, line = MISTAKES[case]
    made(tmp_path, **contents)
    source = tmp_path / next(iter(contents), "none").replace("__", "/").replace("_", ".")
    filled = json.loads(json.dumps({"source": str(source), **keys}).replace("{}", str(tmp_path)))
    with pytest.raises(UserError, match=line) as caught:
        prepare(DataConfig(**{"partition": SHARED, **filled}), 0, tokenizer, tmp_path / "cache")
    assert str(caught.value).startswith("data.")


def test_mistakes_with_saved_data_sets(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    one, several = tmp_path / "one", tmp_path / "several"
    datasets.Dataset.from_list(ROWS).save_to_disk(one)
    write_dict(several)
    for keys, line in (
        ({"source": str(one), "split": "dev"}, r"^data\.split: dev: .* holds one data set without splits; drop the key"),
        ({"source": str(several), "split": "test"}, r"^data\.split: test: no such split in .*; use one of train, dev"),
        (
            {"source": str(several), "validation": "test"},
            r"^data\.validation: test: no such split in .*; use one of train, dev",
        ),
        ({"source": str(several), "validation": "train"}, r"^data\.validation: train: the split that clients train on"),
        ({"source": str(several), "separator": ";"}, r"^data\.separator: ;: without effect"),
    ):
        with pytest.raises(UserError, match=line):
            prepare(DataConfig(partition=SHARED, **keys), 0, tokenizer, tmp_path / "cache")
    (one / "data-00000-of-00001.arrow").write_bytes(b"torn")
    with pytest.raises(UserError, match=rf"^data\.source: {one}: cannot be loaded: .*; save it again"):
        prepare(DataConfig(source=str(one), partition=SHARED), 0, tokenizer, tmp_path / "cache")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("data.source=5", r"data\.source: 5: expected a name, or a list of at least one"),
        ("data.source=[]", r"data\.source: \[\]: expected a name"),
        ("data.validation=[a.csv, 3]", r"data\.validation: \['a\.csv', 3\]: expected a name"),
        ("data.separator=ab", r"data\.separator: ab: expected string of length 1 or null"),
    ],
)
def test_mistakes_in_the_keys(override: str, line: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("name: c\n")
    with pytest.raises(UserError, match=line):
        load_config(tmp_path / "c.yaml", [override])


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
def test_a_bomb_is_refused_before_it_fills_the_memory(
    pack: Callable[[bytes], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_file, "BOMB_BYTES", 1 << 20)
    read_bytes: list[int] = []
    whole = data_file._Unpacked.readinto
    monkeypatch.setattr(data_file._Unpacked, "readinto", lambda self, room: read_bytes.append(len(room)) or whole(self, room))
    path = tmp_path / "a.jsonl.gz" if pack is gzip.compress else tmp_path / "a.jsonl.zst"
    path.write_bytes(pack(b'{"text": "' + b"x" * (40 << 20)))
    with pytest.raises(UserError, match=r"unpacks to more than 200 times its size"):
        read(path)
    assert sum(read_bytes) < 20 << 20
    # Below the bound, text that repeats itself is only text.
    path.write_bytes(pack(b'{"text": "' + b"x" * 500_000 + b'"}\n'))
    assert len(read(path)[0]["text"]) == 500_000


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("\ufeffone\r\ntwo\x85\n".encode()))
    assert read(tmp_path / "a.txt.gz") == [{"text": "one\r\ntwo\x85\n"}]
    for name in ("b", "c"):
        (tmp_path / f"{name}.txt").write_text(name)
    table = open_source(DataConfig(source=str(tmp_path / "?.txt"))).table({"text"})
    assert list(table["text"]) == ["b", "c"] and table.place(1) == f"row 1 of {tmp_path / 'c.txt'}"


def test_many_small_files_are_few_chunks(tmp_path: Path) -> None:
    for index in range(50):
        (tmp_path / f"c{index}.jsonl").write_bytes(jsonl([{"text": f"{index} {row}"} for row in range(3)]))
    table = open_source(DataConfig(source=str(tmp_path))).table({"text", "client"})
    assert len(table["text"]._chunks) == len(table["client"]._chunks) == 1 and len(table) == 150
    chosen = table.select(np.array([0, 149]))
    assert list(chosen["text"]) == ["0 0", "9 2"] and list(chosen["client"]) == ["c0", "c9"]


# The page -----------------------------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[1] / "docs" / "data.md").read_text()


def test_the_page_has_every_kind_of_file_and_every_field() -> None:
    kinds = set(re.findall(r"`(\.\w+)`", "".join(re.findall(r"^\| (`\..*?) \|", PAGE, re.MULTILINE))))
    assert kinds == set(READERS) and not [ending for ending in COMPRESSIONS if f"`{ending}`" not in PAGE]
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (.+) \| (yes|no) \|$", PAGE, re.MULTILINE)
    fields: dict[str, dict[str, tuple[str, ...]]] = {}
    for template, field, names, needed in rows:
        fields.setdefault(template, {})[field] = tuple(re.findall(r"`(\w+)`", names))
        assert (needed == "no") == (field in columns.OPTIONAL), field
    assert fields == columns.FIELDS


def test_the_examples_of_the_page_are_configurations() -> None:
    examples = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    read = [Config.model_validate(parse_yaml(example, "data.md")).data for example in examples]
    assert len(read) >= 6 and not [data for data in read if data == DataConfig()]
