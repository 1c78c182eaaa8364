"""A run opened from its folder holds what the run itself held: every tensor of every tier and client, and what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from every import every
from federations import Result, make_config, own_values, run_alone, write_inputs

from fedmoe_ds.clients.client import Client
from fedmoe_ds.errors import UserError
from fedmoe_ds.methods import RoundContext
from fedmoe_ds.results import Selection, TrainedRun, open_run

SHORT: dict[str, Any] = {"local": {"max_steps": 1}, "evaluation": {"client_sequences": 0}}
RANKS = {
    "tiers": [{"top_k": 8, "rank": 4, "share": 1}, {"top_k": 4, "rank": 2, "share": 1}, {"top_k": 2, "rank": 1, "share": 1}]
}
METHODS: dict[str, dict[str, Any]] = {
    "flame": {"method": {"name": "flame", "rescaler_scope": "layer"}},
    "hetlora": {"method": {"name": "hetlora"}, "federation": RANKS},
    "fslora": {"method": {"name": "fslora"}, "federation": RANKS},
    "flora": {"method": {"name": "flora"}},
    "fedsa-lora": {"method": {"name": "fedsa-lora"}},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trained")
    write_inputs(root, num_experts=8, num_experts_per_tok=8)
    return root


@pytest.fixture(scope="module", params=METHODS)
def trained(request: pytest.FixtureRequest, root: Path) -> tuple[Result, TrainedRun]:
    """One run of every kind of method, as it ended and as it is read back."""
    result = run_alone(make_config(root, request.param, SHORT, METHODS[request.param]))
    return result, open_run(root / "runs" / request.param)


def received(result: Result, selection: Selection, member: Client) -> dict[str, torch.Tensor]:
    """What evaluation puts into the model, by canonical key."""
    parts, bank = result.parts, result.parts.state.adapters
    for name in (name for name in parts.state.personal.specs if name in bank):
        indices = [one.index for one in selection.members]
        bank.client(name, 0).copy_(own_values(parts)[name][indices].double().mean(0))
    assignment = parts.spec.method.assign(member, RoundContext(0, parts.state.personal.dense(member.index)))
    got = parts.evaluator._received(assignment)
    return {key: value.clone() for key, _, value in got.items(0, with_personal=True)}


def test_every_tier_and_client(trained: tuple[Result, TrainedRun]) -> None:
    result, run = trained
    assert run.round == 2 and [vars(client) | {"rows": None} for client in result.parts.clients] == list(map(vars, run.clients))
    selections = [run.select(tier) for tier in run.tiers] + [run.select(client=client.name) for client in run.clients]
    for selection in selections:
        expected = received(result, selection, selection.members[0])
        found = {key: run.value(key, block, selection) for key, block in run.items()}
        assert list(found) == list(expected)
        assert every(torch.equal(value, expected[key]) for key, value in found.items())


def test_merged_weights(trained: tuple[Result, TrainedRun]) -> None:
    result, run = trained
    base = result.parts.state.server.get("base")
    keys = [f"layers.{layer}.experts.{expert}.down.base" for layer in range(2) for expert in range(8)]
    # A weight without a product is the model's own, and in no checkpoint.
    moved = base.changed if base is not None else set()
    assert every((run.base(key) is not None) == (key in moved) for key in keys)
    if base is not None:
        assert moved and every(torch.equal(value, run.base(key)) for key, _, value in base.items(0) if key in moved)


def test_what_is_refused(root: Path, tmp_path: Path) -> None:
    folder = root / "runs" / "one"
    tiers = [{"top_k": 4, "rank": rank, "share": 1} for rank in (2, 4)]
    run_alone(make_config(root, "one", SHORT, {"federation": {"tiers": tiers}, "method": {"name": "hetlora"}}))
    run = open_run(folder)
    assert run.select("4 r2").members[0].rank == 2 and run.select().members[0].rank == 4
    for options, words in (
        ({"tier": "4"}, "--tier: 4: names several tiers; choose among '4 r4', '4 r2'"),
        ({"tier": "3"}, "--tier: 3: is no tier of this run; choose among '4 r4', '4 r2'"),
        ({"client": "client-0001"}, "--client: client-0001: no client of this run has this name; did you mean 'client-001'?"),
        ({"client": "client-001", "tier": "4"}, "--tier: 4: with --client client-001: a client's model is that of its own"),
    ):
        with pytest.raises(UserError) as error:
            run.select(**options)
        assert str(error.value).startswith(words), error.value
    lone = tmp_path / "round-00002"
    shutil.copytree(folder / "checkpoints" / "round-00002", lone)
    with pytest.raises(UserError, match=r"nobody knows the tiers of the clients of .*metrics\.jsonl is missing; give the run"):
        open_run(lone).select()
    (lone / "adapters-00000-of-00001.safetensors").write_bytes(b"")
    other = tmp_path / "model"
    shutil.copytree(root / "model", other)
    (other / "config.json").write_text((other / "config.json").read_text().replace('"rope_theta": 10000', '"rope_theta": 9000'))
    for path, extra, words in (
        (tmp_path / "none", {}, "holds no run"),
        (folder, {"round_index": 7}, "--round: 7: no checkpoint of it is kept; there are 1, 2"),
        (lone, {}, "does not match its checksum"),
        (lone, {"round_index": 1}, "is a checkpoint already"),
        (folder, {"model": other}, "is not the model of"),
    ):
        with pytest.raises(UserError) as error:
            open_run(path, **extra)
        assert words in str(error.value), error.value
