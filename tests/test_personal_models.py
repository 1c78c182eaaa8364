"""Evaluation of personal models: clients that were never trained share one score, and none of the figures changes by that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from federations import Result, make_config, run_alone, write_inputs

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
