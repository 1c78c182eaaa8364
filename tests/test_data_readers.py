"""Readers against plain ones: a file gives the rows that were written, text verbatim, or one line that names file and line.

The plain readers of this test share nothing with those of the package: CSV is read letter by letter, Parquet one
column at a time, JSONL by `json.loads` and a walk over its pairs.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from fedmoe_ds.config.data_section import DataConfig, PartitionConfig
from fedmoe_ds.data.federated import FederatedData, prepare
from fedmoe_ds.data.readers import DataFile
from fedmoe_ds.data.sources import FileSource, quiet_datasets
from fedmoe_ds.data.tokenizer import train_tokenizer
from fedmoe_ds.errors import UserError

FILES = 340  # of each of three kinds
WANTED = ("instruction", "input", "output", "who")
TEXTS = [
    *("2024-01-01", "007", "1.10", "True", "null", "NA", "", " ", "-0", "1e5", "9223372036854775808", "12:30"),
    *("a,b", 'say "yes"', "two\nlines", "carriage\rreturn", "both\r\nof them", "tab\t", "nul\x00inside", "\ufeffmark"),
    *("é", "e\u0301", "日本", "\U0001f600", "\u2028", "\x85", "\x1c", "</s>", "<|endoftext|>"),
]
OTHERS: list[Any] = [5, 2**63, 2**64, -1, 1.5, True, False, [], ["a"], {"a": {"b": [None]}}, 10**400]


Capture = pytest.CaptureFixture[str]


class Refusal(Exception):
    """What a plain reader says instead of rows."""


def plain_jsonl(content: bytes) -> list[dict[str, Any]]:
    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in found}) != len(found):
            raise Refusal("key twice")
        return dict(found)

    def constant(word: str) -> Any:
        raise Refusal(word)

    def number(word: str) -> float:
        if math.isinf(float(word)):
            raise Refusal(word)
        return float(word)

    hooks: dict[str, Any] = {"object_pairs_hook": pairs, "parse_constant": constant, "parse_float": number}
    rows = []
    for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        if not line.decode("utf-8").strip():
            continue
        row = json.loads(line.decode("utf-8"), **hooks)
        if not isinstance(row, dict):
            raise Refusal("no object")
        for name in WANTED:
            if isinstance(row.get(name), str):
                row[name].encode()
        rows.append({name: row.get(name) for name in WANTED})
    return rows


def plain_csv(content: bytes) -> list[dict[str, Any]]:
    """RFC 4180, one letter after the other; a quote inside an unquoted field is a letter."""
    text, rows, row, field, place = content.removeprefix(b"\xef\xbb\xbf").decode("utf-8") + "\0end", [], [], "", 0
    stop, begun = len(text) - 4, False
    while place < stop:
        letter = text[place]
        if letter == '"' and not begun:
            begun, place = True, place + 1
            while True:
                if place >= stop:
                    raise Refusal("no closing quote")
                if text[place] == '"' and text[place + 1] == '"' and place + 1 < stop:
                    field, place = field + '"', place + 2
                elif text[place] == '"':
                    break
                else:
                    field, place = field + text[place], place + 1
            place += 1
            if place < stop and text[place] not in ",\r\n":
                raise Refusal("text after a closing quote")
        elif letter == ",":
            row, field, begun, place = [*row, field], "", False, place + 1
        elif letter in "\r\n":
            if row or begun:
                rows.append([*row, field])
            row, field, begun = [], "", False
            place += 2 if text[place : place + 2] == "\r\n" else 1
        else:
            field, begun, place = field + letter, True, place + 1
    if row or begun:
        rows.append([*row, field])
    if not rows:
        return []
    header, *body = rows
    if len(set(header)) != len(header) or any(len(fields) != len(header) for fields in body):
        raise Refusal("ragged, or a column twice")
    return [{name: dict(zip(header, fields, strict=True)).get(name) for name in WANTED} for fields in body]


def plain_parquet(path: Path) -> list[dict[str, Any]]:
    file = pq.ParquetFile(path)
    names = file.schema_arrow.names
    if len(set(names)) != len(names):
        raise Refusal("column twice")
    rows: list[dict[str, Any]] = [{} for _ in range(file.metadata.num_rows)]
    for name in set(names) & set(WANTED):
        column = file.read([name]).column(0)
        column.validate(full=True)
        for row, value in zip(rows, column.to_pylist(), strict=True):
            row[name] = value
    return [{name: row.get(name) for name in WANTED} for row in rows]


def some_rows(draw: random.Random, values: list[Any]) -> tuple[list[str], list[dict[str, Any]]]:
    names = draw.sample([*WANTED, "score", "", "x y"], draw.randint(1, 5))
    return names, [{name: draw.choice(values) for name in names} for _ in range(draw.choice([0, 1, 2, 3, 7]))]


def spoiled(draw: random.Random, content: bytes) -> bytes:
    """The same file with one byte or a piece too much, too little, or another one; often left as it is."""
    if draw.random() < 0.5:
        return content
    pieces = [b'"', b",", b"\n", b"\r", b"\xff", b"\x00", b"\xed\xa0\x80", b"{", b"}", b"", b""]
    place = draw.randint(0, len(content))
    return content[:place] + draw.choice(pieces) + content[place + draw.choice([0, 1, 5]) :]


def write_jsonl(draw: random.Random, path: Path) -> None:
    everything = [*TEXTS, *OTHERS, None, float("nan"), "\ud800"]
    _, rows = some_rows(draw, everything if draw.random() < 0.5 else [*TEXTS, None])
    lines = []
    for row in rows:
        kept = {name: value for name, value in row.items() if draw.random() < 0.8}
        line = json.dumps(kept, ensure_ascii=draw.random() < 0.5 or "\ud800" in kept.values())
        if draw.random() < 0.05:
            line = line[:-1] + (", " if kept else "") + '"who": 1, "who": 2}'
        lines.append(draw.choice([line, line, line, line + " ", draw.choice(["[1]", "3", "", "  ", "[" * 3000, line + line])]))
    end = draw.choice(["\n", "\r\n"])
    content = draw.choice(["", "\ufeff"]) + end.join(lines) + draw.choice(["", end])
    path.write_bytes(spoiled(draw, content.encode()))


def write_csv(draw: random.Random, path: Path) -> None:
    names, rows = some_rows(draw, TEXTS)
    if draw.random() < 0.05:
        names = [*names, names[0]]
    end = draw.choice(["\n", "\r\n", "\r"])

    def quoted(text: str) -> str:
        needs = any(letter in text for letter in ',"\r\n') or text == "" or draw.random() < 0.2
        return '"' + text.replace('"', '""') + '"' if needs else text

    lines = [",".join(map(quoted, names))]
    lines += [",".join([*(quoted(row[name]) for name in names), *draw.choice([[]] * 30 + [["b"]])]) for row in rows]
    content = draw.choice(["", "\ufeff"]) + end.join(lines) + draw.choice(["", end, end + end])
    path.write_bytes(spoiled(draw, b"" if draw.random() < 0.02 else content.encode()))


def write_parquet(draw: random.Random, path: Path) -> None:
    names, rows = some_rows(draw, [*TEXTS, None])
    columns: list[Any] = [
        pa.array([row[name] for row in rows], draw.choice([pa.string(), pa.large_string()])) for name in names
    ]
    if draw.random() < 0.5:
        kind, values = draw.choice(
            [(pa.int64(), [2**62, None]), (pa.float64(), [1.0, None, 2.5]), (pa.bool_(), [True]), (pa.list_(pa.int8()), [[1]])]
        )
        columns[0] = pa.array([draw.choice(values) for _ in rows], kind)
    if draw.random() < 0.2 and rows:
        columns[-1] = pa.array([b"\xff"] * len(rows)).view(pa.string())
    if draw.random() < 0.1:
        names, columns = [*names, names[0]], [*columns, columns[0]]
    pq.write_table(pa.Table.from_arrays(columns, names), path)
    path.write_bytes(spoiled(draw, path.read_bytes()) if draw.random() < 0.3 else path.read_bytes())


WRITERS: dict[str, Callable[[random.Random, Path], None]] = {
    ".jsonl": write_jsonl,
    ".csv": write_csv,
    ".parquet": write_parquet,
}
PLAIN: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
    ".jsonl": lambda path: plain_jsonl(path.read_bytes()),
    ".csv": lambda path: plain_csv(path.read_bytes()),
    ".parquet": plain_parquet,
}


def ours(path: Path) -> list[dict[str, Any]]:
    table = FileSource(DataFile(path)).table(WANTED)
    columns = {name: list(table[name]) if name in table.columns else [None] * len(table) for name in WANTED}
    return [{name: columns[name][row] for name in WANTED} for row in range(len(table))]


def typed(rows: list[dict[str, Any]]) -> str:
    return repr(rows)  # True is no 1, and NaN is NaN


@pytest.mark.parametrize("ending", WRITERS)
def test_a_thousand_files_give_what_a_plain_reader_gives(ending: str, tmp_path: Path, capfd: Capture) -> None:
    read = refused = 0
    for seed in range(FILES):
        path = tmp_path / f"f{ending}"
        WRITERS[ending](random.Random(f"{ending} {seed}"), path)
        try:
            expected: list[dict[str, Any]] | None = PLAIN[ending](path)
        except (Refusal, ValueError, RecursionError, OSError, pa.ArrowException):
            expected = None
        try:
            found: list[dict[str, Any]] | None = ours(path)
        except UserError as error:
            found, line = None, str(error)
            assert line.startswith(f"data.source: {path}") and "\n" not in line, (seed, line)
            assert expected in (None, []), (seed, line)
            where = "twice|not readable as parquet" if ending == ".parquet" else rf"{ending}:\d+: "
            assert re.search(f"{where}|no rows", line), (seed, line)
            refused += 1
        else:
            assert expected, (seed, "read, where the plain reader refuses")
            assert typed(found) == typed(expected), seed
            read += 1
    assert min(read, refused) > 30, (read, refused)
    assert capfd.readouterr() == ("", "")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["2024-01-01 007 1.10 True question answer"] * 3, 300)


def learnt(data: FederatedData, tokenizer: PreTrainedTokenizerFast) -> set[str]:
    """The text of all answers, without the end."""
    owners = [*(data.train(c) for c in range(len(data))), *(data.holdout(c) for c in range(len(data))), data.global_holdout()]
    pairs = [pair for owner in owners for pair in zip(owner.input_ids, owner.loss_mask, strict=True)]
    return {tokenizer.decode(ids[mask][:-1]) for ids, mask in pairs}


def test_csv_answers_and_labels_are_trained_on_as_they_stand(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    words = ["007", "1.10", "True", "2024-01-01", "null", "NA", "1e5", "-0"]
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "".join(f"question,{word}\n" for word in words * 3))
    for kind in ("instruction", "classification"):
        columns = {"instruction": "text", "output": "label"} if kind == "instruction" else {}
        config = DataConfig(source=str(path), template=kind, columns=columns, partition=PartitionConfig(kind="iid", clients=2))
        assert {text.strip() for text in learnt(prepare(config, 0, tokenizer, tmp_path), tokenizer)} == set(words)
    path.write_text("text,label\n" + "question,0\nquestion,1\n" * 9)
    numbered = config.model_copy(update={"label_names": ["sports", "business"]})
    assert {t.strip() for t in learnt(prepare(numbered, 0, tokenizer, tmp_path), tokenizer)} == {"sports", "business"}


NULL = '{"instruction": "q", "input": null, "output": "1"}'
DATE = '{"instruction": "q", "output": "2024-01-01"}'


@pytest.mark.parametrize("first", [NULL, DATE])
def test_a_type_that_shows_late_is_no_surprise(first: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    filler = json.dumps({"instruction": "q", "output": "2024-01-01", "unused": "x" * 4000})
    late = '{"instruction": "q", "input": "late text", "output": "late"}'
    path.write_text("\n".join([first, *[filler] * 2700, late]) + "\n")
    assert path.stat().st_size > 10 * 2**20
    config = DataConfig(source=str(path), template="instruction", partition=PartitionConfig(kind="iid", clients=2))
    assert {"late", "2024-01-01"} <= learnt(prepare(config, 0, tokenizer, tmp_path), tokenizer)


LATIN = "text,who\ncafé,a\n".encode("latin-1")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"instruction,output\na,b\nq0,a,b\n", r"a\.csv:3: 3 fields, and the header has 2 \(instruction, output\)"),
        ("a.csv", b"instruction,output\na,b\nq0\n", r"a\.csv:3: 1 fields, and the header has 2"),
        ("a.csv", b'instruction,output\n"two\nlines",b\nq0,a,b\n', r"a\.csv:4: 3 fields"),
        ("a.csv", b"instruction,output,output\na,b,c\n", r"a\.csv:1: column 'output' occurs twice"),
        ("a.jsonl", b'{"output": "a", "output": "b"}\n', r"a\.jsonl:1: not valid JSON \(key 'output' occurs twice\)"),
        ("a.csv", LATIN, r"a\.csv:2: not UTF-8 text; save the file as UTF-8"),
        ("a.csv", "text\nx\n".encode("utf-16"), r"a\.csv:1: not UTF-8 text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": NaN}\n', r"a\.jsonl:2: not valid JSON \(NaN is no JSON number\)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 1e310}\n', r"a\.jsonl:2: not valid JSON \(1e310 is beyond a float\)"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl:1: column 'text' holds half of a surrogate pair"),
        ("a.jsonl", b'{"text": "a"}\n{"text"\n', r"a\.jsonl:2: not valid JSON"),
        ("a.csv", b"text,who\n", r"a\.csv: no rows"),
        ("a.csv", b"", r"a\.csv: no rows"),
    ],
)
def test_a_bad_file_is_one_line(
    name: str,
    content: bytes,
    message: str,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    capfd: Capture,
) -> None:
    (tmp_path / name).write_bytes(content)
    template = "instruction" if b"instruction" in content else "text"
    config = DataConfig(source=str(tmp_path / name), template=template, partition=PartitionConfig(kind="iid", clients=1))
    with pytest.raises(UserError, match=message) as caught:
        prepare(config, 0, tokenizer, tmp_path / "cache")
    assert "\n" not in str(caught.value) and capfd.readouterr() == ("", "")


def test_a_field_may_be_a_long_document(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("output\n" + "long " * 60_000)
    assert len(ours(tmp_path / "a.csv")[0]["output"]) == 300_000


def test_the_hub_library_is_silent_and_then_as_it_was(capfd: Capture) -> None:
    import datasets

    log, level = datasets.logging.get_logger("datasets.load"), datasets.logging.get_verbosity()
    with quiet_datasets():
        log.error("no word")
    assert capfd.readouterr() == ("", "") and datasets.logging.get_verbosity() == level
