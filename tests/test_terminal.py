"""What goes to a terminal: hostile names are shown, never obeyed, and forge no line."""

from __future__ import annotations

import io
import json
import re
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from federations import alone, make_config, read_events, write_inputs
from hypothesis import given
from hypothesis import strategies as st
from launching import REPOSITORY

from fedmoe_ds.config.yaml12 import dump_yaml, parse_yaml
from fedmoe_ds.data.groups import group_names
from fedmoe_ds.data.omissions import Omissions
from fedmoe_ds.distributed.stop_request import StopRequest
from fedmoe_ds.errors import LostError, UserError
from fedmoe_ds.federation import session
from fedmoe_ds.planner.dry_run import describe
from fedmoe_ds.planner.text import aligned
from fedmoe_ds.report import MetricsLog, Progress, final_table, read_metrics, write_report
from fedmoe_ds.report.tables import markdown
from fedmoe_ds.terminal import note, show, visible

# What a terminal obeys, what forges a line, what hides or turns text around, and what no encoding knows.
LETTERS = {
    "escape": "\x1b[2J\x1b]0;title\x07",
    "bell": "\x07",
    "carriage return": "\rerror: forged",
    "newline": "\nerror: forged",
    "next line": "\x85error: forged",
    "line separator": "\u2028error: forged",
    "backspace": "\b\b\b",
    "delete": "\x7f",
    "C1": "\x9b2J\x9d",
    "override": "\u202egnp.exe\u202c",
    "isolate": "\u2066\u2069",
    "mark": "\u200f\u061c",
    "zero width": "\u200b\u200d\ufeff",
    "soft hyphen": "\xad",
    "tag": "\U000e0041",
    "surrogate": "\ud800",
    "undecodable": "\udcff",
    "noncharacter": "\uffff",
}
HOSTILE = [f"a{letters}b" for letters in LETTERS.values()]
PRINTED = ("override", "noncharacter")
"""What may be in a client's name; the others are refused, or told apart from these by nobody."""


def harmless(text: str) -> bool:
    """Newlines are the lines' own."""
    return all(c == "\n" or c.isprintable() or unicodedata.category(c) == "Zs" for c in text)


@given(st.text(st.characters(exclude_categories=[]) | st.sampled_from([c for text in HOSTILE for c in text])))
def test_any_text_becomes_one_line_that_prints(text: str) -> None:
    shown = visible(text)
    assert harmless(shown) and "\n" not in shown and visible(shown) == shown
    shown.encode()
    assert harmless(visible(text, lines=True)) and visible(text, lines=True).count("\n") == text.count("\n")
    if harmless(text) and "\n" not in text:
        assert shown == text, "what prints stays as it is"


def every_way(name: str, stream: io.StringIO, folder: Path) -> list[tuple[str, int]]:
    """(what goes to a terminal or a page, how many lines it may have), for a name from elsewhere."""
    progress = Progress(stream=stream)
    progress.note(f"left out: {name}")
    progress.start_round(1, 1, 1)
    progress.end_round(f"left out (non-finite): {name}")
    told = stream.getvalue()
    evaluation = {"event": "eval", "round": 0, "split": "global", "tier": 4, "perplexity": 2.0}
    with MetricsLog(folder / "metrics.jsonl") as log:
        log.write("run", name=name, versions={name: name})
        log.write("data", clients=[{"name": name, "samples": 1, "tokens": 1, "top_k": 4}], distribution={"labels": [name]})
        log.write("client", round=1, client=name, top_k=4, status=name)
        log.write(**evaluation)
    assert read_metrics(folder / "metrics.jsonl")[2]["client"] == name, "the record has the name as it is"
    page = write_report(folder).read_text(encoding="utf-8")
    omissions = Omissions.of(3, [("cut", name)]).line()
    assert omissions is not None
    return [
        (told, 2),
        (str(UserError(f"data.source: {name}: no such file")), 0),
        (str(LostError(f"rank 3 on {name} died")), 0),
        (final_table([evaluation]), 2),
        (omissions, 0),
        (markdown(["run"], [[name]]), 2),
        ("\n".join(aligned(["purpose"], [[name]])), 1),
        (page, page.count("\n")),
    ]


@pytest.mark.parametrize("kind", LETTERS)
def test_every_way_to_the_terminal(kind: str, tmp_path: Path) -> None:
    for text, lines in every_way(f"a{LETTERS[kind]}b", io.StringIO(), tmp_path):
        assert harmless(text), ascii(text[:200])
        assert text.count("\n") == lines, ascii(text[:200])
        text.encode()


@pytest.mark.parametrize("kind", LETTERS)
def test_a_configuration_that_is_printed_reads_back(kind: str) -> None:
    tree = {"output": f"a{LETTERS[kind]}b"}
    if kind not in ("surrogate", "undecodable", "noncharacter"):  # no YAML file holds these
        assert parse_yaml(visible(dump_yaml(tree), lines=True), "x") == tree


def test_show_and_note(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    show("one\ntwo \x1b")
    note("one\ntwo \x1b")
    assert capsys.readouterr() == ("one\ntwo \\x1b\n", "one\\ntwo \\x1b\n")
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    show("α", narrow)
    narrow.seek(0)
    assert narrow.read() == "\\u03b1\n"


def test_nothing_else_writes_to_the_terminal() -> None:
    """Whoever writes to a stream goes through `terminal`; answers of a worker to its parent are JSON, which escapes."""
    ours = ("terminal.py", "stop_request.py")  # the latter has handlers of signals, with words of its own
    writes = re.compile(r"\bsys\.(__)?std(out|err)[\w.]*\.write|(?<![\w.])print\(|\bos\.write\([12],")
    for path in [*(REPOSITORY / "fedmoe_ds").rglob("*.py"), *(REPOSITORY / "launch").glob("*.py")]:
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            assert not writes.search(line) or "json.dumps" in line or path.name in ours, f"{path}:{number}: {line}"


def test_names_of_clients_and_labels(tmp_path: Path) -> None:
    """Control characters and half of a surrogate pair are no names, also as words of a `ClassLabel`."""
    for kind, letters in LETTERS.items():
        name = f"a{letters}b"
        refused = any(unicodedata.category(c) in ("Cc", "Cs") for c in " ".join(name.split()))
        for values, words in (([name], None), ([0], [name])):
            if refused:
                with pytest.raises(UserError, match=r"^data\.partition\.column: c: row 1 holds "):
                    group_names(values, "c", words)
            else:
                assert group_names(values, "c", words) == [" ".join(unicodedata.normalize("NFC", name).split())], kind


def test_a_run_with_hostile_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Clients, folder and template from elsewhere: plan, progress, final table, `run:` line and page show them."""
    names = [name for kind, name in zip(LETTERS, HOSTILE, strict=True) if kind in PRINTED]
    write_inputs(tmp_path, samples=(4,) * len(names), num_hidden_layers=1, num_experts=4, num_experts_per_tok=2)
    rows = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    known = sorted({row["group"] for row in rows})
    for row in rows:
        row["group"] = names[known.index(row["group"])]
    rows.append(rows[0] | {"output": ""})  # an omission, which names its client
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    small: dict[str, Any] = {"federation": {"rounds": 1}, "local": {"max_steps": 1}}
    config = make_config(tmp_path, "run", small, {"output": str(tmp_path / "runs\x1b[2J\nrun: forged")})
    monkeypatch.setattr(session, "build_topology", lambda config, runtime: alone()[1])
    capfd.readouterr()  # of libraries that wrote the inputs
    show("\n".join(describe(config, 1)))
    ending = session.train(config, alone()[0], "never", StopRequest())
    show("\n".join(ending.lines))
    told = "".join(capfd.readouterr())
    assert harmless(told) and ending.lines[-1].count("\n") == 0 and "run: forged" not in told.splitlines()
    assert r"a\u202egnp.exe\u202cb" in told
    folder = Path(config.output) / "run"
    recorded = next(event for event in read_events(folder) if event["event"] == "data")
    assert sorted(client["name"] for client in recorded["clients"]) == sorted(names)
    assert harmless((folder / "report.html").read_text(encoding="utf-8"))
    sys.stdout.flush()
