"""Tiers of one top-k that buy unequal ranks or experts are told apart: evaluated, recorded, reported, compared, planned."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from every import every
from federations import Result, alone, finish, make_config, own_values, run_alone, write_inputs
from hypothesis import given
from hypothesis import strategies as st
from test_methods_resume import StopsAfter, start

from fedmoe_ds.clients.client import richest
from fedmoe_ds.clients.tiers import Budget, tier_labels, tier_order, tier_top_k
from fedmoe_ds.config import Config
from fedmoe_ds.federation.evaluation_passes import passes
from fedmoe_ds.federation.rounds import Federation
from fedmoe_ds.planner.dry_run import describe
from fedmoe_ds.planner.flops import tier_flops
from fedmoe_ds.planner.workload import resolve
from fedmoe_ds.report import MetricsLog, final_table, write_report
from fedmoe_ds.report.events import LABEL
from fedmoe_ds.report.history import History
from fedmoe_ds.studies.compare.aggregate import Comparison
from fedmoe_ds.studies.compare.protocol import Expectation
from fedmoe_ds.studies.compare.record import read_record
from fedmoe_ds.studies.compare.table import tier_table
from fedmoe_ds.studies.compare.verdict import judge
from fedmoe_ds.studies.run import Run

RANKS: list[dict[str, Any]] = [
    {"top_k": 4, "rank": 2, "share": 1.0},
    {"top_k": 8, "share": 1.0},
    {"top_k": 4, "rank": 4, "share": 2.0},
    {"top_k": 4, "rank": 1, "share": 1.0},
    {"top_k": 4, "rank": 2, "share": 1.0},
]
"""Listed in no order, and one of them twice."""
LABELS = ["8", "4 r4", "4 r2", "4 r1"]
SMALL: dict[str, Any] = {
    "federation": {"tiers": RANKS},
    "local": {"max_steps": 2},
    "execution": {"clients_in_flight": 2},
    "evaluation": {"max_sequences": 2},
}
# Clients lose half of their ranks in every round.
HETLORA: dict[str, Any] = {"method": {"name": "hetlora", "gamma": 0.5, "penalty": 20.0}}
EXPERTS: dict[str, Any] = {
    "method": {"name": "hfedmoe"},
    "adapters": {"router": "train"},
    "federation": {"tiers": [{"top_k": 8, "experts": size, "share": 1.0} for size in (3, 9)]},
    "execution": {"micro_batch_size": None},
}

budgets = st.tuples(*[st.integers(1, 4)] * 5)


@given(st.lists(budgets, min_size=1, max_size=8))
def test_labels_name_every_budget_once_and_say_no_more_than_they_must(listed: list[Budget]) -> None:
    labels = tier_labels(listed)
    assert set(labels) == set(listed) and len(set(labels.values())) == len(labels)
    assert sorted(labels.values(), key=tier_order) == list(labels.values()), "the largest budget first"
    assert [budget for budget, _ in labels.items()] == sorted(labels, reverse=True)
    assert every(re.match(LABEL, label) for label in labels.values()), "reports read it back"
    for budget, label in labels.items():
        alone_there = sum(other[0] == budget[0] for other in labels) == 1
        assert tier_top_k(label) == budget[0] and (label == str(budget[0])) == alone_there


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiers")
    write_inputs(folder)
    return folder


def config_of(root: Path, name: str, *changes: dict[str, Any]) -> Config:
    return make_config(root, name, SMALL, HETLORA, *changes)


@pytest.fixture(scope="module")
def ranks(root: Path) -> Result:
    return run_alone(config_of(root, "ranks"))


@pytest.fixture(scope="module")
def experts(root: Path) -> Result:
    return run_alone(make_config(root, "experts", SMALL, EXPERTS))


def of_kind(result: Result, kind: str, **wanted: Any) -> list[dict[str, Any]]:
    return [e for e in result.events if e["event"] == kind and all(e.get(key) == value for key, value in wanted.items())]


def test_a_tier_is_evaluated_with_the_rank_that_it_buys(ranks: Result) -> None:
    """The global adapters with their last rows set to zero, at full rank: what a client of a lower rank receives."""
    parts, found = ranks.parts, {}
    left = own_values(parts)["hetlora.rank"].flatten().tolist()
    assert any(now < client.rank for now, client in zip(left, parts.clients, strict=True)), "clients have given rows up"
    kept = {name: parts.state.adapters.client(name, 0).clone() for name in parts.state.adapters.specs}
    for label, rank in zip(LABELS, (4, 4, 2, 1), strict=True):
        for name, spec in parts.state.adapters.specs.items():
            value = parts.state.adapters.client(name, 0)
            value.copy_(kept[name])
            if spec.rank_axis is not None:
                value.narrow(-2 if spec.rank_axis == 0 else -1, rank, 4 - rank).zero_()
        full = [score for score in parts.evaluator.scores(parts.state.personal, True, False) if score.label == "8"]
        found[label] = [(score.split, score.client, score.loss, score.accuracy) for score in full]
    for name, value in kept.items():
        parts.state.adapters.client(name, 0).copy_(value)
    for label, expected in found.items():
        rows = of_kind(ranks, "eval", round=2, tier_label=label)
        assert [(e["split"], e.get("client"), e["loss"], e["accuracy"]) for e in rows] == expected, label
        assert {e["tier"] for e in rows} == {tier_top_k(label)}
    assert len({str(found[label]) for label in LABELS[1:]}) == 3, "unequal ranks predict differently"


def test_clients_share_passes_of_an_evaluation_and_no_bit_changes(ranks: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator, personal = ranks.parts.evaluator, ranks.parts.state.personal
    sizes, run = [], evaluator.run_pass

    def noting(parts: Any, how: Any) -> Any:
        sizes.append(len(parts))
        return run(parts, how)

    monkeypatch.setattr(evaluator, "run_pass", noting)
    together = evaluator.scores(personal, True, False)
    largest = max(sizes)
    monkeypatch.setattr(evaluator, "shares_passes", False)
    sizes.clear()
    assert evaluator.scores(personal, True, False) == together
    assert largest > 1 == max(sizes)
    assert passes([2, 2, 1, 5, 1], [9, 3, 9, 3, 4], 4) == [[1], [3], [4, 0, 2]], (
        "equal lengths are neighbours; a larger part is alone"
    )


@pytest.mark.parametrize(("run", "labels"), [("ranks", LABELS), ("experts", ["8 e9", "8 e3"])])
def test_metrics_tell_tiers_apart(run: str, labels: list[str], request: pytest.FixtureRequest) -> None:
    result: Result = request.getfixturevalue(run)
    (head,), (data,) = of_kind(result, "run"), of_kind(result, "data")
    assert [tier["tier_label"] for tier in head["budgets"]] == labels
    assert head["tiers"] == sorted({tier_top_k(label) for label in labels}, reverse=True), "caps, as ever"
    tier_of = {client["name"]: client["tier_label"] for client in data["clients"]}
    assert {tier["tier_label"]: tier["clients"] for tier in head["budgets"]} == {
        label: list(tier_of.values()).count(label) for label in labels
    }
    for index, split in [(0, "global"), (1, "global"), (2, "global"), (0, "clients"), (2, "clients")]:
        assert [e["tier_label"] for e in of_kind(result, "eval", round=index, split=split)] == labels
    for event in of_kind(result, "client"):
        assert event["tier_label"] == tier_of[event["client"]]
    for index in (1, 2):
        trained = {e["tier_label"] for e in of_kind(result, "client", round=index)}
        assert [e["tier_label"] for e in of_kind(result, "experts", round=index)] == [
            tier for tier in labels if tier in trained
        ]


def test_the_report_and_the_final_table_have_a_row_for_every_tier(ranks: Result, root: Path) -> None:
    history = History.of(ranks.events)
    assert history.tiers == LABELS
    rows = [line.split("  ") for line in final_table(ranks.events).splitlines()[2:]]
    assert [[cell.strip() for cell in row if cell][1] for row in rows] == LABELS * 2
    page = write_report(root / "runs" / "ranks").read_text()
    for label in LABELS:
        assert f">top-k {label}</p>" in page and f'data-tier="{label}"' in page and f"top-k {label}: " in page


def test_metrics_from_before_there_were_labels_still_make_a_report(ranks: Result, tmp_path: Path) -> None:
    later = ("tier_label", "budgets", "lengths")
    bare = [{key: value for key, value in event.items() if key not in later} for event in ranks.events]
    for event in bare:
        for client in event.get("clients", []) if event["event"] == "data" else []:
            del client["tier_label"]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in bare))
    page = write_report(tmp_path).read_text()
    assert History.of(bare).tiers == ["8", "4"] and ">top-k 4</p>" in page and "4 r" not in page


def test_a_comparison_has_a_table_for_every_tier(ranks: Result, root: Path) -> None:
    shutil.copytree(root / "runs" / "ranks", root / "runs" / "ended")
    with MetricsLog(root / "runs" / "ended" / "metrics.jsonl") as log:
        log.write("end", rounds=2, digest=ranks.digest)
    record = read_record(Run("hetlora", 0, config_of(root, "ended")))
    comparison = Comparison(["hetlora"], 1, [record])
    assert comparison.tiers == LABELS == list(record.after)
    for label in LABELS:
        (row,) = of_kind(ranks, "eval", round=2, split="global", tier_label=label)
        assert record.after[label]["perplexity"] == row["perplexity"]
        spent = [event["flops"] for event in of_kind(ranks, "client", tier_label=label)]
        assert record.after[label]["flops"] == pytest.approx(sum(spent) / len(spent))
        assert "hetlora" in tier_table(comparison, label)
    asked = [Expectation(claim="hetlora < hetlora", tiers=[4, 8, 2], source="nobody")]
    assert [verdict.tier for verdict in judge(asked, comparison)] == [*LABELS[1:], "8", "2"]
    doubtful = [Expectation(claim="hetlora < hetlora", tiers=[8], more_than_at=4, source="nobody")]
    assert judge(doubtful, comparison)[0].answer == "not tested", "which of the three?"


def test_the_plan_tells_tiers_apart(root: Path) -> None:
    config = config_of(root, "planned")
    job = resolve(config, assume=False)
    flops = tier_flops(job)
    assert [tier.label for tier in flops] == LABELS and len({tier.total for tier in flops}) == len({4, 2, 1})
    (line,) = [line for line in describe(config, 1) if line.startswith("federation: ")]
    for label in LABELS:
        assert f"k={label}: {sum(client.tier == label for client in job.clients)}" in line


def test_the_pooled_client_has_the_largest_budget(ranks: Result) -> None:
    clients = [client for client in ranks.parts.clients if client.top_k == 4]
    assert {client.rank for client in clients} == {4, 2, 1}
    for order in (clients, clients[::-1]):
        assert richest(order) == next(client for client in clients if client.rank == 4)


def test_an_interrupted_round_keeps_its_tiers(root: Path, ranks: Result) -> None:
    parts, journal = start(config_of(root, "stopped"), *alone(), "never")
    parts.training_data = StopsAfter(parts, len(parts.participants(1)) + 3)
    assert Federation(parts, journal).run().interrupted == "SIGTERM"
    journal.close()
    assert parts.state.partial is not None and set(parts.state.partial.activation) == set(LABELS)
    shutil.copytree(root / "runs" / "stopped", root / "runs" / "again")
    again = finish(*start(config_of(root, "again"), *alone(), "auto"))
    assert again.digest == ranks.digest and again.scores() == ranks.scores()
    for kind in ("experts", "eval"):
        ours, theirs = ([{**e, "time": 0.0} for e in of_kind(result, kind, round=2)] for result in (again, ranks))
        assert ours == theirs
    assert torch.equal(own_values(again.parts)["hetlora.rank"], own_values(ranks.parts)["hetlora.rank"])
