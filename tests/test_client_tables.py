"""Tables about very many clients: they hold what lines would, follow the record through kills, and nothing damaged is taken."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
import sys
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from every import every
from federations import alone, make_config, write_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from test_file_modes import masked
from test_report import Page

import fedmoe_ds
from fedmoe_ds.bench.scale.synthetic_record import client_rows, write_record, write_round
from fedmoe_ds.distributed.stop_request import StopRequest
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation import journal, session
from fedmoe_ds.report import MetricsLog, Record, client_tables, metrics, read_metrics, write_report
from fedmoe_ds.report.client_tables import FOLDER, MOST_LINES, Rows, table_of
from fedmoe_ds.report.history import History
from fedmoe_ds.results import open_run as open_trained
from fedmoe_ds.studies.scaling.measured import _client_flops

SPENT = {"time", "seconds"}
MANY = MOST_LINES + 20
CLIENT_ROW = re.compile(
    r'class="name">(client-\d+)</td>(?:(?!</tr>).)*data-v="([^"]+)">[^<]*</td><td class="num" data-v="([^"]+)">[^<]*</td></tr>'
)
"""Of a client its name, and its own perplexity before and after."""


def same(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Events without what the clock says; a field that is null may as well be absent."""
    kept = [event for event in events if event["event"] in ("data", "client", "eval")]
    return [{key: value for key, value in event.items() if key not in SPENT and value is not None} for event in kept]


def as_lines(folder: Path, target: Path) -> Path:
    """The same record as a run of an earlier version has written it."""
    target.mkdir()
    with (target / "metrics.jsonl").open("w") as file:
        for event in read_metrics(folder / "metrics.jsonl"):
            file.write(json.dumps(event) + "\n")
    return target


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    write_record(folder, MANY, every_tier=True)
    return folder


@pytest.fixture(scope="module")
def page(record: Path) -> str:
    return write_report(record).read_text()


# Content ------------------------------------------------------------------------------------------------------------------

WHOLE = st.none() | st.integers(0, 2**53)
REAL = st.none() | st.floats()
ROW = st.fixed_dictionaries(
    {
        "client": st.text(max_size=9),
        "tier_label": st.sampled_from(["8", "4 r2", "1 e8"]),
        "status": st.sampled_from(["ok", "x"]),
    },
    optional={
        "steps": WHOLE,
        "rank": WHOLE,
        "flops": st.none() | st.floats(0, 1e300),
        "loss_first": REAL,
        "loss_last": REAL,
        "experts_held": st.lists(st.integers(0, 64), min_size=3, max_size=3),
    },
)


@pytest.mark.parametrize("examples", [25, pytest.param(1000, marks=pytest.mark.sweep)])
def test_a_table_holds_what_lines_would(tmp_path_factory: pytest.TempPathFactory, examples: int) -> None:
    @settings(deadline=None, max_examples=examples)
    @given(st.lists(ROW, min_size=1, max_size=30))
    def holds(rows: list[dict[str, Any]]) -> None:
        folder = tmp_path_factory.mktemp("rows")
        with MetricsLog(folder / "lines" / "metrics.jsonl") as log:
            for row in rows:
                log.write("client", round=3, **row)
        with MetricsLog(folder / "table" / "metrics.jsonl") as log:
            log.write_table("client", 3, iter(rows))
        lines, table = (same(read_metrics(folder / name / "metrics.jsonl")) for name in ("lines", "table"))
        assert lines == table and len(table) == len(rows)
        events = list(Record(folder / "table" / "metrics.jsonl"))
        told = [(event["event"], event["of"], event["table"]["rows"]) for event in events]
        assert told == [("table", "client", len(rows))]

    holds()


def test_few_clients_are_lines_and_many_are_tables(tmp_path: Path) -> None:
    # Four tiers score every client: the first have as many rows as there may be lines.
    for count, tables in ((MOST_LINES // 4, 0), (MOST_LINES, 2), (MOST_LINES + 1, 5)):
        folder = tmp_path / str(count)
        write_record(folder, count, every_tier=True)
        assert len(list(folder.glob("clients/*"))) == tables
        events = read_metrics(folder / "metrics.jsonl")
        kinds = [event["event"] for event in events]
        assert kinds.count("client") == 2 * count and "table" not in kinds
        (data,) = (event for event in events if event["event"] == "data")
        assert len(data["clients"]) == len(data["distribution"]["counts"]) == count
        assert data["clients"][7]["targets"] == data["clients"][7].get("tokens", 1200) == 1200


def test_omissions_of_clients_are_in_the_table(tmp_path: Path) -> None:
    holdings = [{"name": f"c{i}", "tier_label": "4", "top_k": 4, "samples": 1, "targets": 9} for i in range(MANY)]
    told = {"rows": 900, "total": {"cut": 4, "empty": 1}, "clients": {f"c{i}": {"cut": 1 + i} for i in (1, 7)}}
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.write_data(clients=holdings, omissions=told)
    (event,) = read_metrics(tmp_path / "metrics.jsonl")
    assert event["omissions"] == told
    history = History.of(Record(tmp_path / "metrics.jsonl"))
    assert history.holdings.omissions == told and history.holdings.names[7] == "c7" and history.tiers == ["4"]
    assert "c7 (8)" in write_report(tmp_path).read_text()


def test_a_table_follows_the_umask(tmp_path: Path) -> None:
    with masked(0o027), MetricsLog(tmp_path / "metrics.jsonl") as log:
        write_round(log, client_rows(MANY, 1), 1)
    (table,) = tmp_path.glob("clients/*")
    assert [stat.S_IMODE(path.stat().st_mode) for path in (table, table.parent)] == [0o640, 0o750]


def test_a_result_tells_tables_with_their_summary_and_their_rows(record: Path) -> None:
    """`metrics` of the interface for Python: a table's event is what its line says, its rows are events of their kind."""
    result, lines = fedmoe_ds.open_run(record), [json.loads(line) for line in (record / "metrics.jsonl").open()]
    tables = [line for line in lines if line["event"] == "table"]
    assert result.metrics("table") == tables and len(tables) == 4 and every(line["summary"] for line in tables)
    (data,), (line,) = result.metrics("data"), (line for line in lines if line["event"] == "data")
    assert [data[name] for name in ("table", "summary")] == [line[name] for name in ("table", "summary")]
    assert len(data["clients"]) == len(data["distribution"]["counts"]) == MANY
    told = result.metrics()
    assert [event for event in told if event["event"] != "table"] == [
        {**event, **(data if event["event"] == "data" else {})} for event in read_metrics(record / "metrics.jsonl")
    ]
    assert [event["event"] for event in told if event["event"] == "table"] == ["table"] * 4
    place = told.index(tables[1])
    assert [event["client"] for event in told[place + 1 : place + 3]] == ["client-0000000", "client-0000001"]


# The page -----------------------------------------------------------------------------------------------------------------


def test_lines_and_tables_make_the_same_page(record: Path, page: str, tmp_path: Path) -> None:
    assert write_report(as_lines(record, tmp_path / "lines")).read_text() == page
    text = Page(page) and page
    assert f"With {MANY} clients the page names those at either end; the other {MANY - 50} are in" in text
    assert "The 25 with the lowest own perplexity after and the 25 with the highest" in text
    assert f"(500 of {MANY} clients, evenly spaced within every tier)" in text and "<h3>Targets per client</h3>" in text
    trained = [History.of(Record(folder / "metrics.jsonl")).trained for folder in (record, tmp_path / "lines")]
    assert trained[0].flops == trained[1].flops and every(trained[0].flops.values())


def test_experts_that_clients_held_are_on_the_page(tmp_path: Path) -> None:
    """Per layer on average, in the latest round of each; nothing where nobody held less than all."""
    rows = [{**row, "experts_held": [2 + place % 2, 4]} for place, row in enumerate(client_rows(6, 2))]
    del rows[5]["experts_held"]
    for folder, as_table in (("lines", False), ("table", True)):
        write_record(tmp_path / folder, 6, rounds=1)
        page = write_report(tmp_path / folder).read_text()
        assert "experts held" not in page and "load variation" not in page
        with MetricsLog(tmp_path / folder / "metrics.jsonl") as log:
            if as_table:
                log.write_table("client", 2, iter(rows))
            else:
                write_round(log, rows, 2)
        held = History.of(Record(tmp_path / folder / "metrics.jsonl")).trained.figure("experts_held")
        assert held.tolist()[:5] == [3.0, 3.5, 3.0, 3.5, 3.0] and math.isnan(held[5])
        page = write_report(tmp_path / folder).read_text()
        assert "experts held" in page and 'data-v="3.5">3.5' in page and "a client without a number held all" in page


def test_quantiles_are_those_of_the_rows(record: Path) -> None:
    rows = [event for event in read_metrics(record / "metrics.jsonl") if event["event"] == "client"]
    tokens: dict[str, int] = {}
    for row in rows:
        tokens[row["client"]] = tokens.get(row["client"], 0) + row["tokens"]
    trained = History.of(Record(record / "metrics.jsonl")).trained
    assert dict(zip(trained.places, trained.figure("tokens").tolist(), strict=True)) == tokens
    assert trained.figure("rounds").tolist() == [2.0] * MANY
    latest = {row["client"]: row["loss_last"] for row in rows}
    assert dict(zip(trained.places, trained.figure("loss_last").tolist(), strict=True)) == latest


def test_scores_are_kept_by_tier(record: Path) -> None:
    """Without personal models every tier's model is scored on every client's hold-out: four rows of a client and round."""
    rows = [event for event in read_metrics(record / "metrics.jsonl") if event.get("split") == "client"]
    own = History.of(Record(record / "metrics.jsonl")).own_scores
    assert len(own) == MANY and len(own.tiers) == 4 and len(rows) == 2 * 4 * MANY
    found = {(row["round"], row["tier_label"], row["client"]): row["perplexity"] for row in rows}
    for tier in own.tiers:
        for round_index in (0, own.last_round(tier)):
            assert own.values(tier, round_index, "perplexity") == [found[round_index, tier, name] for name in own.places]
        assert own.values(tier, 1, "perplexity") == [], "neither the first round nor the last"
    names = list(own.places)
    codes = own.tier_codes(names[:-1], ["8"] * (MANY - 1))
    before, after = own.ends("perplexity", codes)
    assert before[:-1].tolist() == [found[0, "8", name] for name in names[:-1]]
    assert after[:-1].tolist() == [found[2, "8", name] for name in names[:-1]]
    assert codes[-1] == -1, "nobody knows the tier of the last one: both ends are by the largest"
    assert [before[-1], after[-1]] == [found[0, "8", names[-1]], found[2, "8", names[-1]]]


@pytest.mark.parametrize("clients", [6, MANY])
@pytest.mark.parametrize("cut", [False, True])
def test_before_and_after_are_of_one_model(clients: int, cut: bool, tmp_path: Path) -> None:
    """That of the client's tier, however many clients the page names, and where the record has lost the `data` event."""
    write_record(tmp_path / "whole", clients, every_tier=True)
    events = [event for event in read_metrics(tmp_path / "whole" / "metrics.jsonl") if not (cut and event["event"] == "data")]
    scored = {(e["round"], e["tier_label"], e["client"]): e["perplexity"] for e in events if e.get("split") == "client"}
    tiers = {event["client"]: event["tier_label"] for event in events if event["event"] == "client"}
    assert len({*tiers.values()}) > 1
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    rows = CLIENT_ROW.findall(write_report(tmp_path / "cut").read_text())
    assert len(rows) == min(clients, 50)
    for name, before, after in rows:
        expected = [scored[round_index, tiers[name], name] for round_index in (0, 2)]
        assert [float(before), float(after)] == pytest.approx(expected, rel=1e-8), name


def test_the_page_of_very_many_clients_does_not_grow(tmp_path: Path) -> None:
    sizes = []
    for count in (1_000, 5_000):
        write_record(tmp_path / str(count), count, rounds=1)
        sizes.append(write_report(tmp_path / str(count)).stat().st_size)
    assert sizes[1] < 1.02 * sizes[0] < 2e6


def held(thing: Any, seen: set[int]) -> int:
    """Bytes of an object and of all that it holds."""
    if id(thing) in seen or isinstance(thing, type | ModuleType):
        return 0
    seen.add(id(thing))
    parts = [*thing.keys(), *thing.values()] if isinstance(thing, Mapping) else []
    parts += list(thing) if isinstance(thing, list | tuple | set | deque) else []
    parts += [vars(thing)] if hasattr(thing, "__dict__") else []
    return sys.getsizeof(thing) + sum(held(part, seen) for part in parts)


def test_memory_grows_with_clients_and_not_with_rounds(tmp_path: Path) -> None:
    sizes = {}
    # Counted and not traced: Arrow's threads allocate while a trace begins and ends.
    for clients, rounds in ((1_000, 2), (1_000, 16), (2_000, 2)):
        write_record(tmp_path / f"{clients}-{rounds}", clients, rounds)
        sizes[clients, rounds] = held(History.of(Record(tmp_path / f"{clients}-{rounds}" / "metrics.jsonl")), set())
    assert sizes[1_000, 16] < 1.2 * sizes[1_000, 2] < sizes[2_000, 2]


def test_a_round_that_was_recorded_twice_counts_once(record: Path, page: str, tmp_path: Path) -> None:
    """No run writes such a record, but somebody may join two."""
    folder = Path(shutil.copytree(record, tmp_path / "run"))
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    table = next(line for line in lines if '"of":"client"' in line)
    (folder / "metrics.jsonl").write_text("".join([*lines, table]))
    assert write_report(folder).read_text() == page


# Kills --------------------------------------------------------------------------------------------------------------------


def test_what_came_after_the_checkpoint_goes(tmp_path: Path) -> None:
    path, rows = tmp_path / "metrics.jsonl", client_rows(MANY, 1)
    with MetricsLog(path) as log:
        write_round(log, rows, 1)
        position = log.position()
        write_round(log, rows, 2)
        write_round(log, rows, 3)
    (tmp_path / FOLDER / "notes.txt").write_text("a user's")
    (tmp_path / FOLDER / ".draft-x.tmp").write_text("of a killed writer")
    # A process that is killed between the table and its line leaves a table that no line names.
    shutil.copy(tmp_path / FOLDER / "round-000003.parquet", tmp_path / FOLDER / "eval-000003.parquet")
    with MetricsLog(path) as log:
        log.truncate(position)
        assert sorted(file.name for file in (tmp_path / FOLDER).iterdir()) == ["notes.txt", "round-000001.parquet"]
        write_round(log, rows, 2)
    assert [event["round"] for event in read_metrics(path) if event["event"] == "client"] == [1] * MANY + [2] * MANY
    with MetricsLog(path) as log:
        log.truncate(0)
    assert [file.name for file in (tmp_path / FOLDER).iterdir()] == ["notes.txt"]


def test_a_table_that_does_not_fit_on_the_disk_leaves_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: memoryview) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.write("run")
        monkeypatch.setattr(client_tables, "write_whole", full)
        with pytest.raises(OSError, match="No space left"):
            write_round(log, client_rows(MANY, 1), 1)
    assert [event["event"] for event in read_metrics(tmp_path / "metrics.jsonl")] == ["run"]


def test_another_jobs_tables_are_not_replaced(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        with (tmp_path / "metrics.jsonl").open("a") as other:
            other.write('{"event":"x"}\n')
        with pytest.raises(UserError, match="another process writes to it"):
            write_round(log, client_rows(MANY, 1), 1)
    assert not (tmp_path / FOLDER).exists()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_no_link_is_followed(tmp_path: Path, kind: str) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "round-000001.parquet").write_text("somebody else's")
    run = tmp_path / "run"
    if kind == "folder":
        run.mkdir()
        (run / FOLDER).symlink_to(victim)
    else:
        (run / FOLDER).mkdir(parents=True)
        (run / FOLDER / "round-000001.parquet").symlink_to(victim / "round-000001.parquet")
    with MetricsLog(run / "metrics.jsonl") as log:
        if kind == "folder":
            for action in (lambda: log.truncate(0), lambda: write_round(log, client_rows(MANY, 1), 1)):
                with pytest.raises(OSError, match="symbolic link"):
                    action()
        else:
            write_round(log, client_rows(MANY, 1), 1)
            assert not (run / FOLDER / "round-000001.parquet").is_symlink()
    assert (victim / "round-000001.parquet").read_text() == "somebody else's"


# A whole run --------------------------------------------------------------------------------------------------------------

RUN: dict[str, Any] = {
    "federation": {"rounds": 3},
    "local": {"max_steps": 1},
    "evaluation": {"max_sequences": 2, "client_sequences": 1},
    "checkpoint": {"keep": 3},
}


def train(inputs: Path, name: str) -> tuple[Path, str]:
    config = make_config(inputs, name, RUN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "build_topology", lambda config, runtime: alone()[1])
        ending = session.train(config, alone()[0], "auto", StopRequest())
    assert ending.exit_code == 0
    return Path(config.output) / name, ending.lines[-2]


def test_a_run_with_tables_is_the_run_with_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it was killed after its second round: then what came after its first checkpoint is written once more."""
    write_inputs(tmp_path, samples=(6, 5, 4, 4), num_hidden_layers=1, num_experts=4, num_experts_per_tok=2)
    lines, digest = train(tmp_path, "lines")
    assert not (lines / FOLDER).exists()
    for module in (journal, metrics):
        monkeypatch.setattr(module, "MOST_LINES", 1)
    tables, with_tables = train(tmp_path, "tables")
    assert with_tables == digest
    assert sorted(path.name for path in (tables / FOLDER).iterdir()) == [
        "data.parquet", "eval-000000.parquet", "eval-000003.parquet", *(f"round-{n:06d}.parquet" for n in (1, 2, 3))
    ]  # fmt: skip
    key: Callable[[dict[str, Any]], str] = lambda event: json.dumps(event, sort_keys=True)  # noqa: E731
    wanted = sorted(same(read_metrics(lines / "metrics.jsonl")), key=key)
    assert sorted(same(read_metrics(tables / "metrics.jsonl")), key=key) == wanted
    for damaged in ("round-00002", "round-00003"):
        (tables / "checkpoints" / damaged / "manifest.json").write_text("{}")
    (tables / FOLDER / "round-000003.parquet").write_bytes(b"torn")
    assert train(tmp_path, "tables") == (tables, digest)
    assert sorted(same(read_metrics(tables / "metrics.jsonl")), key=key) == wanted
    result = fedmoe_ds.open_run(tables)
    assert len(result.metrics("client")) == len(wanted) - len(result.evaluations) - 1 > 0
    names = [client.name for client in open_trained(tables).clients]
    assert names == result.clients == fedmoe_ds.open_run(lines).clients and len(names) == 4
    told = [
        [value for event in Record(folder / "metrics.jsonl") for value in _client_flops(event)] for folder in (lines, tables)
    ]
    assert told[0] == told[1] and len(told[0]) == len(result.metrics("client")) and every(told[0])


# Damage -------------------------------------------------------------------------------------------------------------------

ROWS = [{"client": f"c{i}", "tier_label": "4", "top_k": 4, "tokens": i, "flops": 1.0, "status": "ok"} for i in range(5)]
ODD: dict[str, tuple[str, Any]] = {
    "client is missing": ("client", None),
    "client has rows without": ("client", pa.array([None] * 5, pa.string())),
    "tokens is int32": ("tokens", pa.array([1] * 5, pa.int32())),
    "tokens has numbers below 0": ("tokens", pa.array([-1] * 5)),
    "flops has numbers that are not": ("flops", pa.array([math.inf] * 5)),
    "experts_held has lists of different": ("experts_held", pa.array([[1], [1, 2], None, None, None])),
    "experts_held has lists without": ("experts_held", pa.array([[1, None]] * 5)),
    "tier_label: 'x' is no tier": ("tier_label", pa.array(["x"] * 5)),
    "holds 4 rows": ("", None),
}
"""By the message: a column, and what it is instead; without a column a row is missing."""


def changed(column: str, values: pa.Array | None) -> pa.Table:
    table = table_of("client", ROWS)
    if not column:
        return table.slice(1)
    place = table.schema.get_field_index(column)
    if place < 0:
        return table.append_column(column, values)
    return table.remove_column(place) if values is None else table.set_column(place, column, values)


def sealed(path: Path) -> Rows:
    return Rows(path, "client", 5, hashlib.sha256(path.read_bytes()).hexdigest(), 1, 0.0)


@pytest.mark.parametrize("message", ODD)
def test_a_table_of_another_form_is_one_line(tmp_path: Path, message: str) -> None:
    path = tmp_path / FOLDER / "round-000001.parquet"
    path.parent.mkdir()
    pq.write_table(table_of("client", ROWS), path)
    assert len(sealed(path).read()) == 5
    pq.write_table(changed(*ODD[message]), path)
    with pytest.raises(UserError) as error:
        sealed(path).read()
    assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_damaged_table_is_one_line(record: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(record, tmp_path / "run"))
    path = folder / FOLDER / "round-000001.parquet"
    sound = path.read_bytes()

    def refused(what: str) -> bool:
        with pytest.raises(UserError) as error:
            write_report(folder)
        text = str(error.value)
        return text.startswith(f"{path}: ") and what in text and "\n" not in text

    path.write_bytes(sound[:-1] + b"?")
    assert refused("SHA-256 differs")
    path.unlink()
    assert refused("No such file")
    path.symlink_to(record / FOLDER / path.name)
    assert refused("symbolic link")
    path.unlink()
    path.write_bytes(b"PAR1")
    line = (
        (folder / "metrics.jsonl").read_text().replace(hashlib.sha256(sound).hexdigest(), hashlib.sha256(b"PAR1").hexdigest())
    )
    (folder / "metrics.jsonl").write_text(line)
    assert refused("is no table of this run")


@pytest.mark.parametrize("file", ["../config.yaml", "clients/../x.parquet", "/etc/passwd", "clients/.parquet", 3])
def test_a_line_names_no_other_file(tmp_path: Path, file: object) -> None:
    table = {"file": file, "rows": 1, "sha256": "0" * 64}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"event": "table", "of": "client", "round": 1, "table": table}) + "\n")
    with pytest.raises(UserError, match=r"line 1: table\.table\.file"):
        read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("foreign", [{"of": [1], "round": {}}, {"of": "client", "round": 7}, {"of": {"a": 1}, "rows": 3}, {}])
def test_a_data_event_has_no_kind_but_its_own(record: Path, tmp_path: Path, foreign: dict[str, Any]) -> None:
    """Fields that no reader of this event knows decide nothing, of whatever type they are."""
    folder = Path(shutil.copytree(record, tmp_path / "run"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    (place,) = (place for place, line in enumerate(lines) if line["event"] == "data")
    lines[place] |= foreign
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert History.of(Record(folder / "metrics.jsonl")).holdings.names[7] == "client-0000007"
    (folder / FOLDER / "data.parquet").unlink()
    with pytest.raises(UserError, match=r"data\.parquet: cannot be read") as error:
        read_metrics(folder / "metrics.jsonl")
    assert "\n" not in str(error.value)
