"""Evaluation of personal models: clients that were never trained share one score, and none of the figures changes by that."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from federations import Result, make_config, run_alone, write_inputs

from fedmoe_ds.bench.scale.curves import evaluation, homes, personal
from fedmoe_ds.checkpoint.personal_state import Personal
from fedmoe_ds.federation.evaluation import Evaluator

SOME: dict[str, Any] = {
    "method": {"name": "fedsa-lora"},
    "federation": {"rounds": 1, "participation": 0.34},
    "evaluation": {"client_sequences": 2, "clients_every": 1},
}


def scored(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Result, int]:
    """A run, and how many parts its evaluations have scored."""
    count, run = 0, Evaluator._run

    def counted(self: Evaluator, parts: Any, cut: Any, how: Any) -> Any:
        nonlocal count
        count += len(parts)
        return run(self, parts, cut, how)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "_run", counted)
        return run_alone(make_config(root, name, SOME)), count


def test_clients_that_were_never_trained_share_a_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_inputs(tmp_path)
    result, few = scored(tmp_path, "shared", monkeypatch)
    monkeypatch.setattr(Personal, "begins_as_all", lambda self, index, names: False)
    every_one, many = scored(tmp_path, "apart", monkeypatch)
    assert result.scores() == every_one.scores() and result.digest == every_one.digest
    assert few < many


def calls(action: Callable[[], object]) -> int:
    """How many calls of functions an action makes: a cost that no busy machine changes."""
    count = 0

    def seen(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(seen)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("method", ["fedit", "fedsa-lora"])
def test_an_evaluation_is_linear_in_clients(method: str) -> None:
    found = []
    for clients in (150, 300):
        evaluator, own = evaluation._evaluator(method, clients)
        found.append(calls(lambda e=evaluator, p=own: e.scores(p, per_client=True, plain=False)))  # type: ignore[misc]
    assert 1.6 < found[1] / found[0] < 2.1, found


def test_the_curve_of_personal_state() -> None:
    """A later checkpoint writes its participants' rows, however many clients there are."""
    few, many = personal.measure(200), personal.measure(800)
    assert many["first_mib"] > 3.9 * few["first_mib"] and many["written_mib"] < 3 * 100 / 64
    assert many["folder_mib"] < 2 * many["rows_mib"]


@pytest.mark.parametrize("clusters", [2, 64])
def test_the_curve_of_many_clusters(clusters: int) -> None:
    """Whoever looks at all rows receives each once, and no rank gives one of its own twice."""
    found, clients = homes.measure(clusters), homes._CLIENTS
    assert found["mean_given"] == found["digest_given"] == clients / clusters
    assert found["mean_received"] == clients and found["digest_received"] == 0
    assert (found["one_received"], found["one_messages"]) == (1, 1)
