"""Scaling studies: the arithmetic on recorded runs, predictions beside it, and what the outputs say."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from every import every
from hypothesis import given, settings
from hypothesis import strategies as st
from scaling_inputs import make_request, plan, record_all, record_run, round_event, start, write_study
from scipy import stats

from fedmoe_ds.errors import UserError
from fedmoe_ds.planner import World, load_hardware, predict
from fedmoe_ds.studies.ratio import Ratio, ratio_of
from fedmoe_ds.studies.scaling import Request
from fedmoe_ds.studies.scaling.measured import machine_file, measure, timed_rounds
from fedmoe_ds.studies.spread import Spread


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
    assert (found.rounds, found.seconds, found.recorded, found.tokens) == ((2, 3), 6.0, 5.0, 1200)
    assert found.phases == {"train": 4.0, "aggregate": 0.5, "evaluate": 0.25, "other": 1.25}
    assert found.collectives == {"all_to_all": 0.5, "all_reduce": 0.25} and found.flops == 6.0e9
    assert found.peak_mib is None and found.cores == 1


def test_efficiency_by_hand(request_: Request) -> None:
    """1200 tokens a round: 200 and 300 tokens/s on one rank, 400 and 320 on two."""
    record_all(request_, [(6.0, 4.0), (3.0, 3.75)])
    code, text = start(request_)
    rows = rows_of(request_)
    assert code == 0 and [float(row["tokens_per_s"]) for row in rows] == [200.0, 300.0, 400.0, 320.0]
    assert [float(row["efficiency"]) for row in rows] == [0.8, 1.2, 0.8, 0.64]
    # Of training alone: 1200 tokens in what `train` and `aggregate` took.
    training = (4.5, 2.5, 1.5, 2.25)
    assert [float(row["train_tokens_per_s"]) for row in rows] == pytest.approx([1200 / s for s in training], rel=1e-5)
    base = (1200 / 4.5 + 1200 / 2.5) / 2
    expected = [1200 / seconds / base / ranks for seconds, ranks in zip(training, (1, 1, 2, 2), strict=True)]
    assert [float(row["train_efficiency"]) for row in rows] == pytest.approx(expected, rel=1e-5)
    assert [(row["value"], row["repeat"], row["cores"], row["timed_rounds"]) for row in rows] == [
        ("1", "0", "1", "2"),
        ("1", "1", "1", "2"),
        ("2", "0", "1", "2"),
        ("2", "1", "1", "2"),
    ]
    assert "1 (shared)" in text and "ranks 2: more ranks than the 1 core of the machine." in text
    head, _, first, second = text.splitlines()[:4]
    assert [cell.strip() for cell in head.split("|")][6:8] == ["efficiency of training", "of the whole round"]
    assert [cell.strip() for cell in first.split("|")][6:8] == ["100 %", "100 %"], "the first value is what 100 % means"
    trained, whole = (cell.strip() for cell in second.split("|")[6:8])
    assert trained.startswith("89 % (") and whole.startswith("72 % (")
    assert "All 4 runs ended with one digest: ab." in text
    assert every(row["predicted_s"] == "" for row in rows), "nothing is predicted without --hardware"


def test_the_baselines_spread_belongs_to_the_efficiency() -> None:
    """By hand: relative variances of the two means add up, with Welch's degrees of freedom."""
    own, base = Spread({0: 9.0, 1: 10.0, 2: 11.0}), Spread({0: 20.0, 1: 24.0})
    variances = [1.0 / 3 / 10.0**2, 8.0 / 2 / 22.0**2]
    freedom = sum(variances) ** 2 / (variances[0] ** 2 / 2 + variances[1] ** 2 / 1)
    reach = stats.t.ppf(0.975, freedom) * math.sqrt(sum(variances))
    found = ratio_of(own, base, 0.5)
    assert found.value == pytest.approx(10 / 22 / 2)
    assert (found.low, found.high) == pytest.approx((found.value * math.exp(-reach), found.value * math.exp(reach)))
    assert ratio_of(Spread({0: 9.0}), base) == Ratio(9 / 22), "of one run nobody knows how far another would be"
    assert ratio_of(Spread({0: 2.0, 1: 2.0}), Spread({0: 4.0, 1: 4.0})) == Ratio(0.5, 0.5, 0.5)


@settings(max_examples=10, deadline=None)
@given(st.integers(3, 8), st.floats(0.01, 0.1), st.integers(0, 10**6))
def test_the_interval_holds_what_it_promises(repeats: int, spread: float, seed: int) -> None:
    """Of many studies whose true ratio is 1, about 95 % say so; without the baseline's spread it would be fewer."""
    draw = np.random.default_rng(seed)
    samples = np.exp(spread * draw.standard_normal((300, 2, repeats)))
    found = [ratio_of(*(Spread(dict(enumerate(map(float, one)))) for one in study)) for study in samples]
    held = np.mean([ratio.low <= 1.0 <= ratio.high for ratio in found])  # type: ignore[operator]
    assert 0.88 <= held <= 1.0


def test_rounds_of_a_run_and_where_it_ran_are_in_the_table(request_: Request) -> None:
    topology = [{"rank": rank, "host": f"n{rank + 1}", "cluster": rank, "shard": 0} for rank in range(2)]
    one: dict[str, Any] = {"cpu": "a CPU", "cores": 64, "memory_gib": 512.0, "gpu": None, "system_name": "Linux"}
    hosts = [{"host": "a", **one}, {"host": "b", **one}]
    hosts.append({"host": "c", **one, "gpu": {"name": "H100", "count": 8, "cuda": "13"}})
    run = plan(request_)[1].runs[0]
    record_run(plan(request_)[1], 0, 4.0, start={"topology": topology, "device": "H100", "machines": hosts})
    events = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    events[-1] |= {"peak_bytes": [2**20, 2**21]}
    run.metrics.write_text("".join(json.dumps(event) + "\n" for event in events))
    start(replace(request_, collect=True))
    (row,) = rows_of(request_)
    expected = {"device": "H100", "dtype": run.config.foundation.dtype, "method": "flame", "seed": "0"}
    expected |= {"tokens_per_round": "1200", "nodes": "n1 n2", "foundation": "nano-olmoe", "versions": "torch 2.13"}
    expected |= {f"s_per_round_{which}": "4" for which in ("min", "median", "max")}
    assert {name: row[name] for name in expected} == expected and "peak_mib_by_rank" not in row
    assert request_.output is not None
    memory = list(csv.DictReader(io.StringIO((request_.output / "scaling-memory.csv").read_text())))
    found = [(line["value"], line["rank"], line["host"], line["peak_mib"]) for line in memory]
    assert found == [("2", "0", "n1", "1"), ("2", "1", "n2", "2")]
    report = (request_.output / "scaling.md").read_text()
    assert "a CPU, 64 cores, 512 GiB, Linux; torch 2.13 (on a, b); a CPU, 64 cores, 512 GiB, 8 x H100, Linux; " in report


@pytest.mark.parametrize(
    ("machine", "told"),
    [
        ({"host": "a", "cpu": "a CPU"}, "Measured on: a CPU; torch 2.13 (on a)."),
        ({"cores": 8, "gpu": {"name": "H100"}}, "Measured on: 8 cores, H100; torch 2.13."),
        ({"host": "a", "cpu": None, "memory_gib": None, "system_name": "Linux"}, "Measured on: Linux; torch 2.13 (on a)."),
        ({"host": "a"}, "Measured on: torch 2.13 (on a)."),
        ({}, "Measured on: torch 2.13."),
    ],
)
def test_a_machine_of_which_less_is_known(machine: dict[str, Any], told: str, request_: Request) -> None:
    """By the record of another version, and by the study's own note."""
    record_run(plan(request_)[1], 0, 4.0, start={"machines": [machine]})
    start(replace(request_, collect=True))
    assert request_.output is not None
    assert told in (request_.output / "scaling.md").read_text()
    run = plan(request_)[1].runs[0]
    run.metrics.write_text(run.metrics.read_text().replace(json.dumps([machine]), "null"))
    machine_file(run).write_text(json.dumps(machine))
    start(replace(request_, collect=True))
    assert told in (request_.output / "scaling.md").read_text()


@pytest.mark.parametrize("fact", [{"cpu": 7}, {"cores": "8"}, {"memory_gib": -1}, {"gpu": "H100"}, {"gpu": {"count": []}}])
def test_a_machine_that_is_none_is_refused(fact: dict[str, Any], request_: Request) -> None:
    record_run(plan(request_)[1], 0, 4.0, start={"machines": [fact]})
    with pytest.raises(UserError, match=rf"metrics\.jsonl.*run\.machines\.0\.{next(iter(fact))}"):
        start(replace(request_, collect=True))
    run = plan(request_)[1].runs[0]
    run.metrics.write_text(run.metrics.read_text().replace(json.dumps([fact]), "null"))
    machine_file(run).write_text(json.dumps(fact))
    with pytest.raises(UserError, match=r"machine\.json: describes no machine; remove it$"):
        start(replace(request_, collect=True))


@pytest.mark.parametrize(
    ("device", "clock", "seconds", "known"),
    [
        ("cpu", None, 0.5, True),
        ("H100", None, 0.5, False),
        ("H100", "device", 0.5, True),
        ("H100", "device", None, False),
        ("cpu", "host", 0.5, True),
    ],
)
def test_only_a_device_knows_its_collectives(
    device: str, clock: str | None, seconds: float | None, known: bool, request_: Request
) -> None:
    """Earlier versions recorded what the host took to queue them: an empty cell is better."""
    point = plan(request_)[0]
    tally = {"all_to_all": {"calls": 3, "seconds": seconds, "bytes": 8}}
    record_run(point, 0, 6.0, collectives=tally, start={"device": device, "collectives_timed": clock})
    assert (measure(point.runs[0]).collectives == {"all_to_all": 0.5}) == known
    start(replace(request_, collect=True))
    assert rows_of(request_)[0]["all_to_all_s"] == ("0.5" if known else "")


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
