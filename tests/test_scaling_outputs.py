"""Scaling studies: the arithmetic on recorded runs, predictions beside it, and what the outputs say."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from every import every
from scaling_inputs import make_request, plan, record_all, record_run, round_event, start, write_study

from fedmoe_ds.planner import World, load_hardware, predict
from fedmoe_ds.studies.scaling import Request
from fedmoe_ds.studies.scaling.measured import measure, timed_rounds


@pytest.fixture
def request_(corpus: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Request:
    return make_request(corpus, tmp_path_factory.getbasetemp() / "shapes", tmp_path)


def rows_of(request: Request) -> list[dict[str, str]]:
    assert request.output is not None
    return list(csv.DictReader(io.StringIO((request.output / "scaling.csv").read_text())))


def test_only_rounds_that_follow_one_of_the_same_start_are_timed() -> None:
    events: list[dict[str, Any]] = [
        {"event": "run", "time": 0.0},
        round_event(1, 10.0, 3.0),
        {"event": "eval", "time": 11.0},
        round_event(2, 14.0, 3.0),
        {"event": "resume", "time": 500.0},
        round_event(3, 510.0, 3.0),
        round_event(4, 513.5, 3.0),
    ]
    assert [(seconds, event["round"]) for seconds, event in timed_rounds(events)] == [(4.0, 2), (3.5, 4)]


def test_phases_add_up_to_the_wall_clock(request_: Request) -> None:
    point = plan(request_)[0]
    tally = {"all_to_all": {"calls": 3, "seconds": 0.5, "bytes": 8}, "all_reduce": {"calls": 1, "seconds": 0.25, "bytes": 8}}
    record_run(point, 0, 6.0, collectives=tally)
    found = measure(point.runs[0])
    assert (found.rounds, found.seconds, found.recorded, found.tokens_per_s) == ((2, 3), 6.0, 5.0, 200.0)
    assert found.phases == {"train": 4.0, "aggregate": 0.5, "evaluate": 0.25, "other": 1.25}
    assert found.collectives == {"all_to_all": 0.5, "all_reduce": 0.25} and found.flops_per_s == 1.0e9
    assert found.peak_mib is None and found.cores == 1


def test_efficiency_by_hand(request_: Request) -> None:
    """1200 tokens a round: 200 and 300 tokens/s on one rank, 400 and 320 on two."""
    record_all(request_, [(6.0, 4.0), (3.0, 3.75)])
    code, text = start(request_)
    rows = rows_of(request_)
    assert code == 0 and [float(row["tokens_per_s"]) for row in rows] == [200.0, 300.0, 400.0, 320.0]
    assert [float(row["efficiency"]) for row in rows] == [0.8, 1.2, 0.8, 0.64]
    assert [(row["value"], row["repeat"], row["cores"], row["timed_rounds"]) for row in rows] == [
        ("1", "0", "1", "2"),
        ("1", "1", "1", "2"),
        ("2", "0", "1", "2"),
        ("2", "1", "1", "2"),
    ]
    assert "1 (shared)" in text and "ranks 2: more ranks than the 1 core of the machine." in text
    assert "100 % ± 28 %" in text and "72 % ± 11 %" in text
    assert "All 4 runs ended with one digest: ab." in text
    assert every(row["predicted_s"] == "" for row in rows), "nothing is predicted without --hardware"


def test_predictions_stand_beside_what_was_measured(request_: Request) -> None:
    """The recorded rounds end a second before the next begins; a prediction is compared with them alone."""
    write_study(request_.config.parent, axis="clients", values=[4])
    (point,) = plan(request_)
    record_run(point, 0, 6.0)
    _, text = start(replace(request_, hardware="cpu"))
    rounds = [predict(point.config, World(1, 1), load_hardware("cpu"), number).round_seconds for number in (2, 3)]
    (row,) = rows_of(request_)
    assert float(row["predicted_s"]) == pytest.approx(sum(rounds) / 2, rel=1e-5)
    assert float(row["predicted_over_measured"]) == pytest.approx(sum(rounds) / 2 / 5.0, rel=1e-5)
    assert "Predictions: the planner with cpu" in text and request_.output is not None
    assert "predicted and measured" in (request_.output / "scaling.svg").read_text()


def test_the_axis_k_compares_flops(request_: Request) -> None:
    write_study(request_.config.parent, axis="k", values=[1, 2], ranks=2)
    for point, seconds in zip(plan(request_), (4.0, 8.0), strict=True):
        record_run(point, 0, seconds)
    start(request_)
    assert [float(row["flops_per_s"]) for row in rows_of(request_)] == [1.5e9, 7.5e8]
    assert [float(row["efficiency"]) for row in rows_of(request_)] == [1.0, 0.5]


def test_efficiency_needs_the_first_value(request_: Request) -> None:
    record_run(plan(request_)[1], 0, 4.0)
    code, text = start(replace(request_, collect=True))
    (row,) = rows_of(request_)
    assert code == 1 and row["efficiency"] == "" and "| ranks-1-r0 | not finished |" in text


def test_different_digests_of_one_federation_are_a_failure(request_: Request) -> None:
    record_all(request_, [(6.0,), (3.0,)])
    record_run(plan(request_)[0], 1, 6.0)
    record_run(plan(request_)[1], 1, 6.0, digest="cd")
    code, text = start(request_)
    assert code == 1 and "NOT THE SAME RESULT: ranks-1-r0 and ranks-2-r1" in text


def test_outputs_hold_tables_and_every_panel(request_: Request) -> None:
    tally = {"all_to_all": {"calls": 3, "seconds": 0.5, "bytes": 8}, "gather": {"calls": 1, "seconds": 0.125, "bytes": 8}}
    record_all(request_, [(6.0, 4.0), (3.0, 3.75)], collectives=tally)
    copy = request_.config.parent / "docs.md"
    code, _ = start(replace(request_, collect=True, report=copy))
    assert code == 0 and request_.output is not None
    report = (request_.output / "scaling.md").read_text()
    assert copy.read_text() == report.replace("(scaling.svg)", "(docs.svg)")
    assert "Measured on: a CPU, 1 cores, an OS; torch 2.13." in report
    assert [row["all_to_all_s"] for row in rows_of(request_)] == ["0.5"] * 4
    drawing = ElementTree.fromstring((request_.output / "scaling.svg").read_text())
    assert copy.with_suffix(".svg").read_text() == (request_.output / "scaling.svg").read_text()
    words = [element.text or "" for element in drawing.iter("{http://www.w3.org/2000/svg}text")]
    titles = [word for word in words if word.startswith(("Throughput", "Efficiency", "Where", "The same"))]
    assert len(titles) == 4 and {"ideal", "measured", "in all-to-all", "tokens/s", "% of the first value"} <= set(words)
    (title,) = drawing.findall("{http://www.w3.org/2000/svg}title")
    assert title.text == "Strong scaling over ranks: mean and sample standard deviation over repeats"
