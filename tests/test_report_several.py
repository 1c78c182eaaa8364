"""Several runs on one page: all of them in every picture, what they differ in, old records, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from every import every
from test_report import HOSTILE, Page, record_run

from fedmoe_ds.commands import report
from fedmoe_ds.errors import UserError
from fedmoe_ds.report import read_metrics, write_report
from fedmoe_ds.report.differences import differing, flat
from fedmoe_ds.report.several import _letters, page, read_runs

CONFIG = "name: {name}\nseed: {seed}\nmethod:\n  name: {method}\nlocal: {{lr: {lr}, steps: null}}\ndeepspeed: {{}}\n"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two that have ended alike, and one on its way."""
    root = tmp_path_factory.mktemp("runs")
    for number, (name, method, lr) in enumerate([("first", "flame", 0.1), ("second", "flame", 0.1), ("third", "hetlora", 0.2)]):
        record_run(root / name, rounds=2 + number, finish=number < 2)
        (root / name / "config.yaml").write_text(CONFIG.format(name=name, seed=number, method=method, lr=lr))
    return [root / "first", root / "second", root / "third"]


def section(text: str, anchor: str) -> str:
    return text[text.index(f'<section id="{anchor}">') :].partition("</section>")[0]


def cells(part: str) -> list[list[str]]:
    """The rows of a table's body as text."""
    body = part[part.index("<tbody>") : part.index("</tbody>")]
    return [[re.sub(r"<[^>]+>", "", cell) for cell in row.split("</td>")[:-1]] for row in body.split("</tr>")[:-1]]


def test_all_runs_are_in_every_picture(runs: list[Path]) -> None:
    text = page(read_runs(runs))
    parsed = Page(text)
    assert parsed.headings == ["Runs", "Results", "Convergence per tier", "What differs"] and parsed.scripts == 1
    assert "http://" not in text and "https://" not in text and 'class="empty"' not in text
    assert every(reference.startswith("#") for reference in parsed.references)
    curves = section(text, "convergence")
    charts = curves.split("<svg")[1:]
    assert len(charts) == 2 * 3 * 2, "hold-outs, tiers, figures"
    for chart in charts:
        assert re.findall(r'class="end (l\d)">([A-Z])<', chart) and set(re.findall(r'class="end l\d">([A-Z])<', chart)) == set(
            "ABC"
        )
        assert [chart.count(f"{key}: ") for key in "ABC"] == [3, 4, 5], "a point per evaluated round"
    rows = cells(section(text, "results"))
    assert len(rows) == 2 * 3 * 3 and [row[1:3] for row in rows[:4]] == [["k 4", "A"], ["k 4", "B"], ["k 4", "C"], ["k 2", "A"]]
    assert rows[0][3:6] == ["22.5", "7.50", "0.333"] and rows[0][-1] == "2" and rows[2][-1] == "4"


def test_who_they_are(runs: list[Path]) -> None:
    text = section(page(read_runs(runs)), "runs")
    rows = cells(text)
    assert [row[:2] for row in rows] == [["A", "first"], ["B", "second"], ["C", "third"]]
    assert [row[5] for row in rows] == ["finished", "finished", "not finished"] and [row[6] for row in rows] == ["2", "3", "4"]
    assert [row[-1] for row in rows] == ["ab" * 6, f"{'ab' * 6} = A", "–"], "equal digests are told"
    assert text.count("ab" * 32) == 2, "and shown whole when pointed at"


def test_bytes(tmp_path: Path) -> None:
    """Those of the rounds' collectives; a record of an older version has none, which is not zero."""
    record_run(tmp_path / "old")
    record_run(tmp_path / "new")
    events = read_metrics(tmp_path / "new" / "metrics.jsonl")
    for event in events:
        if event["event"] == "round":
            event["collectives"] = {"a": {"calls": 1, "seconds": 0.1, "bytes": 2**20}, "b": {"calls": 1, "seconds": 0.1}}
        if event["event"] == "end":
            event["peak_bytes"] = [2**20, 3 * 2**20]
    (tmp_path / "new" / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    old, new = cells(section(page(read_runs([tmp_path / "old", tmp_path / "new"])), "runs"))
    assert old[10:12] == ["–", "–"] and new[10:12] == ["3.00\u202fMiB", "3.00\u202fMiB"]


def test_memory_of_a_gpu_has_a_column_where_a_run_had_one(tmp_path: Path) -> None:
    for name in ("host", "gpu"):
        record_run(tmp_path / name)
    events = read_metrics(tmp_path / "gpu" / "metrics.jsonl")
    end = next(event for event in events if event["event"] == "end")
    end["peak_bytes"], end["device_peak_bytes"] = [2**20], [2**21, 5 * 2**20]
    (tmp_path / "gpu" / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    host, gpu = cells(section(page(read_runs([tmp_path / "host", tmp_path / "gpu"])), "runs"))
    assert host[11:13] == ["–", "–"] and gpu[11:13] == ["1.00\u202fMiB", "5.00\u202fMiB"]
    assert len(host) == 1 + len(cells(section(page(read_runs([tmp_path / "host"])), "runs"))[0])


def test_what_differs(runs: list[Path]) -> None:
    """Only keys with more than one value; never the name."""
    rows = cells(section(page(read_runs(runs)), "differences"))
    assert rows == [["seed", "0", "1", "2"], ["method.name", "flame", "flame", "hetlora"], ["local.lr", "0.1", "0.1", "0.2"]]
    assert "agree in every key" in page(read_runs([runs[0], copied(runs[0], "again")]))


def copied(run: Path, name: str) -> Path:
    copy = run.parent / name
    copy.mkdir(exist_ok=True)
    for file in ("metrics.jsonl", "config.yaml"):
        (copy / file).write_bytes((run / file).read_bytes())
    return copy


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ({"a": 1}, {"a": 1.0}, {"a": ["1", "1.0"]}),
        ({"a": True}, {"a": 1}, {"a": ["true", "1"]}),
        ({"a": None}, {}, {"a": ["null", "–"]}),
        ({"a": {"b": [1, {"c": 2}]}}, {"a": {"b": [1, {"c": 3}]}}, {"a.b": ["[1, {c: 2}]", "[1, {c: 3}]"]}),
        ({"a": {}}, {"a": {"b": 1}}, {"a": ["{}", "–"], "a.b": ["–", "1"]}),
        ({"name": "x", "output": "y"}, {"name": "z"}, {}),
        ({"a": "null", "b": "flame"}, {"a": None, "b": "hetlora"}, {"a": ["'null'", "null"], "b": ["flame", "hetlora"]}),
        ({"a": float("nan"), 1: {2: ""}}, {"a": float("nan"), 1: {2: None}}, {"1.2": ["''", "null"]}),
    ],
)
def test_differences(left: dict[str, Any], right: dict[str, Any], expected: dict[str, list[str]]) -> None:
    from fedmoe_ds.report.differences import _text

    assert {key: [_text(value) for value in values] for key, values in differing([flat(left), flat(right)])} == expected


def test_versions_differ_too(runs: list[Path]) -> None:
    other = copied(runs[0], "newer")
    lines = (other / "metrics.jsonl").read_text().splitlines()
    first = json.loads(lines[0]) | {"versions": {"torch": "9.9"}}
    (other / "metrics.jsonl").write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n")
    assert cells(section(page(read_runs([runs[0], other])), "differences")) == [["version of torch", "–", "9.9"]]


def test_a_run_that_has_just_begun_and_a_record_of_an_old_version(runs: list[Path], tmp_path: Path) -> None:
    """No evaluation, no configuration; tiers that have no label; events that nobody knows."""
    young, old = tmp_path / "young", tmp_path / "old"
    for folder, lines in (
        (young, ['{"event":"run"}', '{"event":"of a later version"}']),
        (old, [f'{{"event":"eval","round":{n},"split":"global","top_k":4,"perplexity":{9 - n}}}' for n in range(2)]),
    ):
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    text = page(read_runs([young, old, runs[0]]))
    Page(text)
    assert "Nothing to compare (no config.yaml, a link, or no mapping): A, B." in text
    assert ["Global hold-out", "k 4", "B", "9.00", "8.00", "0.889"] in [row[:6] for row in cells(section(text, "results"))]
    nothing = page(read_runs([young, copied_young(young)]))
    Page(nothing)
    assert nothing.count("Nothing has been evaluated yet.") == 2 and "agree" not in nothing


def copied_young(young: Path) -> Path:
    other = young.parent / "younger"
    other.mkdir()
    (other / "metrics.jsonl").write_bytes((young / "metrics.jsonl").read_bytes())
    return other


def test_what_a_run_says_is_text(runs: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "hostile"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(json.dumps({"event": "run", "name": HOSTILE, "method": "\x1b<b>"}) + "\n")
    (folder / "config.yaml").write_text(f"method: {{name: {json.dumps(HOSTILE)}}}\n")
    text = page(read_runs([folder, runs[0]]))
    assert Page(text).scripts == 1 and HOSTILE not in text and "<b>" not in text and "\\x1b&lt;b&gt;" in text


def test_the_command(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [str(run) for run in runs]
    assert report.main(words) == 0 and capsys.readouterr().out == "report.html\n"
    Page((tmp_path / "report.html").read_text())
    assert report.main([*words, "--output", "three.html"]) == 0 and (tmp_path / "three.html").exists()
    assert report.main(words[:1]) == 0 and capsys.readouterr().out.splitlines()[-1] == str(runs[0] / "report.html")
    own = (runs[0] / "report.html").read_text()
    assert report.main([*words[:1], "--output", "one.html"]) == 0 and (tmp_path / "one.html").read_text() == own
    assert write_report(runs[0]).read_text() == own


def test_refusals(runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = map(str, runs)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(runs[0])
    write_report(runs[0])
    own = (runs[0] / "report.html").read_bytes()
    for words, message in (
        ([first, str(tmp_path / "none")], r"^run folder: .*none: does not exist; name a folder"),
        ([first, str(tmp_path / "empty")], r"^.*empty/metrics\.jsonl: cannot be read \(No such file"),
        ([first, second, first], r"^run folder: .*first: is .*first once more; name every run once$"),
        ([first, str(tmp_path / "link")], r"^run folder: .*link: is .*first once more"),
        (
            [second, third, "--output", f"{first}/report.html"],
            r"^--output: .*first/report\.html: is the page of the run in that",
        ),
        ([second, "--output", f"{first}/report.html"], r"^--output: .*first/report\.html: is the page of the run in that"),
        ([first, second, "--output", str(tmp_path / "no" / "x.html")], r"^--output: .*x\.html: cannot be written: No such"),
        ([first, second, "--output", str(tmp_path)], r"^--output: .*: cannot be written: is no plain file"),
    ):
        with pytest.raises(UserError, match=message):
            report.main(words)
    monkeypatch.chdir(runs[0])
    with pytest.raises(UserError, match=r"^--output: report\.html: is the page of the run in that folder; give another file$"):
        report.main([second, third])
    assert (runs[0] / "report.html").read_bytes() == own


def test_many_runs_have_a_letter_each() -> None:
    letters = _letters(60)
    assert len(set(letters)) == 60 and letters[:2] == ["A", "B"] and letters[25:28] == ["Z", "A2", "B2"]
