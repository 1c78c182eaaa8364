"""Samples that are left out or cut: counted by kind and client, in one line, in metrics and on the page of the run."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from every import every
from federations import alone, make_config, read_events, write_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from fedmoe_ds.config.schema import DataConfig, PartitionConfig
from fedmoe_ds.data.encoder import Encoder
from fedmoe_ds.data.federated import FederatedData, prepare
from fedmoe_ds.data.omissions import CUT, EMPTY, LEFT_OUT, MEANING, NO_ROOM, Omissions
from fedmoe_ds.data.omissions import describe as describe_omissions
from fedmoe_ds.data.tokenizer import train_tokenizer
from fedmoe_ds.distributed.stop_request import StopRequest
from fedmoe_ds.federation import session
from fedmoe_ds.planner.dry_run import describe
from fedmoe_ds.report.history import History
from fedmoe_ds.report.population import data_section

LENGTH = 48
# Characters are tokens. The headings of the prompt take 34 of them, the label's question 7, the end of text one.
FITS, FULL, LONG = "q", "q" * 60, "a" * 60
ROWS = {"whole": (FITS, "ans"), EMPTY: (FITS, " "), NO_ROOM: (FULL, "ans"), CUT: (FITS, LONG)}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([], 258)


def write(path: Path, kinds: list[tuple[str, str]]) -> Path:
    rows = [{"instruction": ROWS[k][0], "output": ROWS[k][1] + (who if k == "whole" else ""), "who": who} for k, who in kinds]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(source: Path, kind: str, **data: Any) -> DataConfig:
    partition = PartitionConfig(kind=kind, clients=None if kind == "natural" else 3, alpha=5.0, column="who")
    return DataConfig(source=str(source), template="instruction", sequence_length=LENGTH, partition=partition, **data)


def sequences(data: FederatedData) -> list[Any]:
    owners = [*map(data.train, range(len(data))), *map(data.holdout, range(len(data))), data.global_holdout()]
    return [ids for owner in owners for ids in owner.input_ids]


@pytest.mark.parametrize("kind", ["natural", "iid", "dirichlet", "quantity"])
def test_every_row_is_there_whole_or_counted(kind: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    @settings(max_examples=12, deadline=None, database=None)
    @given(st.lists(st.tuples(st.sampled_from(list(ROWS)), st.sampled_from("abc")), max_size=24))
    def check(some: list[tuple[str, str]]) -> None:
        rows = [*some, *[("whole", who) for who in "abc"] * 4]
        data = prepare(config(write(tmp_path / "a.jsonl", rows), kind), 0, tokenizer, tmp_path / "cache")
        told, held = data.omissions, data.global_holdout()
        expected = {k: sum(kind == k for kind, _ in rows) for k in MEANING}
        assert told.rows == len(rows) and told.total == {k: n for k, n in expected.items() if n}
        assert len(sequences(data)) == told.rows - told.left_out
        full = [ids for ids in sequences(data) if len(ids) == LENGTH]
        assert len(full) == expected[CUT] and all(  # none where nothing is cut
            ids[-1] != tokenizer.eos_token_id for ids in full
        )
        for index, name in enumerate(data.names):
            own = told.clients.get(name, {})
            if kind == "natural":
                counts = {k: sum(pair == (k, name) for pair in rows) for k in MEANING}
                assert own == {k: n for k, n in counts.items() if n}
            else:
                dealt = [*data.train(index).input_ids, *data.holdout(index).input_ids]
                cut = sum(len(ids) == LENGTH for ids in dealt)
                assert own == ({CUT: cut} if cut else {})
        if kind != "natural":
            cut = sum(len(ids) == LENGTH for ids in held.input_ids)
            assert cut + sum(own[CUT] for own in told.clients.values()) == expected[CUT]
        assert FederatedData.open(data.path).omissions == told

    check()


def test_the_rule_of_what_is_cut(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Lengths around the limit: one token more cuts the answer, a prompt that fills the sequence leaves the sample out."""
    (prompt,) = Encoder(tokenizer)(["### Instruction:\nq\n\n### Response:\n"])
    room = LENGTH - len(prompt.ids)
    assert room > 4
    for extra in range(-2, 3):
        for longer, text, answer in (("answer", "q", "a" * (room - 1 + extra)), ("prompt", "q" * (room + extra), "a")):
            row = json.dumps({"instruction": text, "output": answer, "who": "x"})
            (tmp_path / "a.jsonl").write_text(
                (row + "\n") * 4 + (json.dumps({"instruction": "q", "output": "w", "who": "x"}) + "\n") * 4
            )
            told = prepare(config(tmp_path / "a.jsonl", "natural"), 0, tokenizer, tmp_path / "cache").omissions.total
            if longer == "answer":
                assert told == ({CUT: 4} if extra > 0 else {}), extra
            else:  # with `room` letters one token of the answer is left, with one letter less its end as well
                assert told == ({NO_ROOM: 4} if extra > 0 else {CUT: 4} if extra == 0 else {}), extra


def test_a_label_is_whole_or_left_out(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    labels = ["short", "l" * 40]
    rows = [{"text": "t" * size, "label": label} for size in (0, 5, 100) for label in labels] * 4
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    iid = PartitionConfig(kind="iid", clients=2)
    data = prepare(
        DataConfig(source=str(tmp_path / "a.jsonl"), template="classification", sequence_length=LENGTH, partition=iid),
        0, tokenizer, tmp_path / "cache",
    )  # fmt: skip
    assert data.omissions.total == {CUT: 4, NO_ROOM: 12}
    assert every(tokenizer.decode(ids).endswith("Label: short<|endoftext|>") for ids in sequences(data))


def test_nothing_omitted_is_no_line(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    data = prepare(config(write(tmp_path / "a.jsonl", [("whole", "a")] * 9), "natural"), 0, tokenizer, tmp_path)
    assert data.omissions.line() is None and data.omissions == Omissions(rows=9)


def test_the_line_and_the_page_name_numbers_and_clients() -> None:
    kinds = [(NO_ROOM, "ann")] * 13 + [(EMPTY, None)] * 3 + [(CUT, name) for name in ("bob", "bob", "cy", "di", "eve")]
    told = Omissions.of(64, kinds)
    line = told.line()
    assert line is not None and "\n" not in line
    assert line.startswith("data: 16 of 64 samples left out (3 with an empty text or answer, 13 whose prompt (or label) leaves")
    assert "5 of 64 cut at data.sequence_length" in line and "ann (13), bob (2), cy (1) and 2 more clients" in line
    assert told.left_out == sum(told.total.get(kind, 0) for kind in LEFT_OUT) == 16
    clients = [{"name": "ann", "samples": 1, "sequences": 1, "tokens": 9, "top_k": 1}]
    history = History()
    history.data = {"clients": clients, "omissions": json.loads(json.dumps(told.as_dict()))}
    page = str(data_section(history))
    assert line in page and page.index("ann") < page.index("bob")
    assert np.all([MEANING[kind] in page for kind in (EMPTY, NO_ROOM, CUT)])
    history.data = {"clients": clients}  # a run from before there was a count
    assert "left out" not in str(data_section(history))


def test_a_run_tells_it_everywhere(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """At the start, in the dry run, in metrics and on the page, the same line; also where prepared data are found again."""
    write_inputs(tmp_path, samples=(9, 7))
    kinds = [(kind, "client-000") for kind in (CUT, NO_ROOM, EMPTY)]
    rows = [{"instruction": ROWS[k][0] * 3, "output": ROWS[k][1] * 3, "group": who} for k, who in kinds]
    with (tmp_path / "data.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    tree = make_config(tmp_path, "told", {"federation": {"rounds": 1}, "local": {"max_steps": 1}})
    planned = describe(tree, 1)
    runtime, topology = alone()
    monkeypatch.setattr(session, "build_topology", lambda *_: topology)
    session.train(tree, runtime, "never", StopRequest())
    (event,) = [event for event in read_events(tmp_path / "runs" / "told") if event["event"] == "data"]
    counted, total = event["omissions"], event["omissions"]["total"]
    assert counted["rows"] == 19 and total[NO_ROOM] >= 1 and total[CUT] >= 1 and total[EMPTY] == 1, total
    line = describe_omissions(counted)
    assert line is not None and line in planned and line in capfd.readouterr().err.replace("\n", " ")
    assert line in html.unescape((tmp_path / "runs" / "told" / "report.html").read_text())
