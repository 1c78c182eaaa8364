"""FedMoE in real runs: all experts for everybody are FedAvg, an expert is made of what its holders trained, and whoever opens a
run finds every client's sub-model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from every import every
from federations import Result, alone, build, finish, make_config, run_alone, write_inputs

from fedmoe_ds.adapter_formats import read_adapter
from fedmoe_ds.clients.client_view import ClientView
from fedmoe_ds.clients.update import ClientUpdate
from fedmoe_ds.errors import UserError
from fedmoe_ds.export.command import main as export
from fedmoe_ds.report import write_report
from fedmoe_ds.results import open_run
from fedmoe_ds.results.evaluate_command import main as evaluate
from fedmoe_ds.results.loaded_model import LoadedModel

QUICK: dict[str, Any] = {
    "local": {"max_steps": 2},
    "execution": {"micro_batch_size": None},
    "evaluation": {"client_sequences": 0, "max_sequences": 2, "every": 9},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fed-moe")
    write_inputs(folder)
    return folder


def tiers(*experts: int) -> dict[str, Any]:
    return {"rounds": 2, "tiers": [{"experts": count, "share": 1.0} for count in experts]}


@pytest.mark.parametrize("router", ["frozen", "train"])
def test_a_budget_for_all_experts_is_fedit_to_the_bit(root: Path, router: str) -> None:
    method, adapters = {"name": "fed-moe", "profile_rounds": 1, "memory_share": 1.0}, {"adapters": {"router": router}}
    ours = run_alone(make_config(root, f"all-{router}", QUICK, adapters, {"method": method, "federation": tiers(16)}))
    everything = {"method": {"name": "fedit"}, "federation": {"rounds": 2, "tiers": [{"top_k": 8, "share": 1.0}]}}
    theirs = run_alone(make_config(root, f"fedit-{router}", QUICK, adapters, everything))
    assert ours.adapters.keys() == theirs.adapters.keys()
    assert every(np.array_equal(value, theirs.adapters[key]) for key, value in ours.adapters.items())


def test_an_expert_is_made_of_what_its_holders_trained(root: Path) -> None:
    """One holder: copied to the bit; none: kept to the bit; several: the mean weighted by their data."""
    method = {"name": "fed-moe", "profile_rounds": 1, "memory_share": 1.0, "least": 1}
    change = {"method": method, "federation": {**tiers(4, 2), "participation": 1.0}}
    parts, journal = build(make_config(root, "held", QUICK, change), *alone())
    name = "experts.down.lora_A"
    seen: dict[int, tuple[np.ndarray, torch.Tensor, int]] = {}
    start: list[torch.Tensor] = []

    def look(view: ClientView, update: ClientUpdate) -> str | None:
        if parts.state.round == 1:
            if not start:
                start.append(parts.state.adapters.client(name, 0).clone())
            value = view.value(parts.execution.bank.specs[name]).clone()
            seen[update.client.index] = update.plan.held_LE, value, update.client.samples
        return None

    finish(parts, journal, look)
    final, holders_LE = parts.state.adapters.client(name, 0), sum(held_LE.astype(int) for held_LE, _, _ in seen.values())
    assert {0, 1, 2} <= set(np.unique(holders_LE)), "all three cases are there"
    for layer, expert in np.ndindex(holders_LE.shape):
        own = [(value[layer, expert], samples) for held_LE, value, samples in seen.values() if held_LE[layer, expert]]
        if not own:
            assert torch.equal(final[layer, expert], start[0][layer, expert])
        elif len(own) == 1:
            assert torch.equal(final[layer, expert], own[0][0])
        else:
            mean = sum(value.double() * samples for value, samples in own) / sum(samples for _, samples in own)
            assert torch.allclose(final[layer, expert].double(), mean, rtol=1e-5, atol=1e-7)
    assert len(seen) == len(parts.clients) and (holders_LE.sum() == sum(2 * client.experts for client in parts.clients))


# A finished run


@pytest.fixture(scope="module")
def finished(root: Path) -> Result:
    """Of six clients some take part twice, some once or never."""
    method = {"name": "fed-moe", "profile_rounds": 1, "least": 2}
    scored = {"client_sequences": 1, "clients_every": 1, "max_sequences": 2, "every": 1}
    change = {"method": method, "federation": {**tiers(9, 5), "participation": 0.67}, "evaluation": scored}
    return run_alone(make_config(root, "finished", QUICK, change))


def held_by(result: Result) -> dict[str, np.ndarray]:
    """The sub-models of the clients that have one, bool [L, E], by name."""
    known = result.parts.state.personal.memories
    held = {result.parts.clients[index].name: memory["held"] > 0 for index, memory in known.items()}
    return {name: held_LE for name, held_LE in held.items() if not held_LE.all()}


def rows_of(capsys: pytest.CaptureFixture[str], *argv: object) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert evaluate([*map(str, argv), "--lines"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_the_record_says_how_many_experts_a_client_held(finished: Result) -> None:
    told = {e["client"]: e["experts_held"] for e in finished.events if e["event"] == "client" and "experts_held" in e}
    assert told == {name: held_LE.sum(1).tolist() for name, held_LE in held_by(finished).items()}
    assert 0 < len(told) < len(finished.parts.clients)
    assert "experts held" in write_report(finished.parts.checkpoints.parent).read_text()


def test_a_client_is_scored_and_served_with_its_sub_model(finished: Result, capsys: pytest.CaptureFixture[str]) -> None:
    """In the run and after it, to the last digit; what a tier has in common is no client's sub-model."""
    folder, sub_models = finished.parts.checkpoints.parent, held_by(finished)
    run = open_run(folder)
    for client in run.clients:
        allowed_LE = run.select(client=client.name).assignment.allowed_LE
        held_LE = sub_models.get(client.name)
        assert allowed_LE is held_LE is None or (allowed_LE == held_LE).all()
    assert run.select().assignment.allowed_LE is None
    theirs = [event for event in finished.events if event["event"] == "eval" and event["round"] == 2]
    keys = ("tier_label", "split", "client", "loss", "accuracy", "targets")
    assert [[row.get(key) for key in keys] for row in rows_of(capsys, folder)] == [
        [row.get(key) for key in keys] for row in theirs
    ]
    matrix = {(row["model"], row["tier_label"], row["client"]): row["loss"] for row in rows_of(capsys, folder, "--clients")}
    own = {row["client"]: (row["tier_label"], row["loss"]) for row in theirs if row["split"] == "client"}
    assert every(matrix[name, tier, name] == loss for name, (tier, loss) in own.items())
    assert every(matrix["global", own[name][0], name] != own[name][1] for name in sub_models)
    part, loaded = finished.parts.data.global_holdout().select(range(2)), LoadedModel.of_run(run)
    evaluator, personal = finished.parts.evaluator, finished.parts.state.personal
    client = next(client for client in finished.parts.clients if client.name in sub_models)
    how = evaluator.assigned(client, personal, False)
    with torch.no_grad(), evaluator.receiving(how):
        expected = evaluator.run_pass([part], how).logits_NV
    with loaded.serving(client=client.name) as forward:
        assert torch.equal(forward([part]).logits_NV, expected)
    with loaded.serving(client.tier) as forward:
        assert not torch.equal(forward([part]).logits_NV, expected)


def test_what_clients_have_in_common_is_exported_and_a_sub_model_refused(finished: Result, tmp_path: Path) -> None:
    folder, name = finished.parts.checkpoints.parent, next(iter(held_by(finished)))
    for fmt in ("peft", "merged"):
        words = (
            rf"^--format: {fmt}: method fed-moe lets its client use some of the experts alone, .*; `fedmoe evaluate --client`"
        )
        with pytest.raises(UserError, match=words):
            export([str(folder), "--format", fmt, "--client", name, "--out", str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())
    export([str(folder), "--format", "peft", "--out", str(tmp_path / "out")])
    read = read_adapter(tmp_path / "out")
    assert every(np.array_equal(read.read(key).numpy(), value) for key, value in finished.adapters.items())
    assert "The run scored its clients' own models" in (tmp_path / "out" / "README.md").read_text()
