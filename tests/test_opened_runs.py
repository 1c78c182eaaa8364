"""Runs that are opened before they have ended: what belongs together is of one round, or nothing is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from every import every
from federations import Result, alone, build, make_config, read_events, run_alone, write_inputs

from fedmoe_ds.errors import UserError
from fedmoe_ds.federation.rounds import Federation
from fedmoe_ds.results import open_run
from fedmoe_ds.results.evaluate_command import main as evaluate

QUICK: dict[str, Any] = {
    "local": {"max_steps": 1, "lr": 1e-2, "clip": None},
    "evaluation": {"client_sequences": 0, "max_sequences": 4},
    "execution": {"clients_in_flight": 1},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("opened")
    write_inputs(root, samples=(14, 9, 7, 5), num_hidden_layers=1, num_experts=4, num_experts_per_tok=2)
    return root


def stopped_within(root: Path, name: str, round_index: int, *changes: dict[str, Any]) -> Path:
    """The folder of a run that was asked to stop while the first client of a round was trained."""
    parts, journal = build(make_config(root, name, QUICK, *changes), *alone())
    told = journal.wave_done

    def wave_done(*wave: Any) -> None:
        if parts.state.round + 1 == round_index:
            parts.stop.name = "SIGTERM"
        told(*wave)

    journal.wave_done = wave_done  # type: ignore[method-assign]
    assert Federation(parts, journal).run().interrupted == "SIGTERM"
    journal.close()
    return Path(journal.folder)


def test_a_run_that_was_stopped_within_a_round(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The figures of its last complete round, as its record has them; never clients' rescalers of the next one."""
    folder = stopped_within(root, "flame", 2, {"method": {"name": "flame"}})
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["round-00001", "round-00001-partial"]
    expected = [(e["tier_label"], e["loss"]) for e in read_events(folder) if e["event"] == "eval" and e["round"] == 1]
    capsys.readouterr()
    assert evaluate([str(folder), "--lines"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["tier_label"], row["loss"]) for row in rows] == expected != []
    words = r"stopped within round 2, and what 1 of its clients keep .* finish the run \(--resume auto\), or take round 1"
    with pytest.raises(UserError, match=words):
        open_run(folder / "checkpoints" / "round-00001-partial")
    shutil.rmtree(folder / "checkpoints" / "round-00001")
    for round_index in (None, 1):
        with pytest.raises(UserError, match=r"while the adapters are of round 1; finish the run \(--resume auto\)$"):
            open_run(folder, round_index)


def test_of_a_run_without_anything_of_clients_a_stop_changes_nothing(root: Path) -> None:
    folder = stopped_within(root, "fedit", 2, {"method": {"name": "fedit"}})
    whole = open_run(folder)
    assert whole.checkpoint.name == "round-00001"
    shutil.rmtree(whole.checkpoint)
    # One adapter for all, and that is of round 1.
    partial = open_run(folder)
    assert partial.checkpoint.name == "round-00001-partial" and partial.round == 1
    result: Result = run_alone(make_config(root, "one", QUICK, {"method": {"name": "fedit"}, "federation": {"rounds": 1}}))
    found = {key: partial.value(key, block, partial.select()) for key, block in partial.items()}
    assert found and every(torch.equal(value, torch.from_numpy(result.adapters[key])) for key, value in found.items())
