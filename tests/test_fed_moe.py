"""FedMoE in real runs: all experts for everybody are FedAvg, and an expert is made of what its holders trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from every import every
from federations import alone, build, finish, make_config, run_alone, write_inputs

from fedmoe_ds.clients.client_view import ClientView
from fedmoe_ds.clients.update import ClientUpdate

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


def test_a_budget_for_all_experts_is_fedit_to_the_bit(root: Path) -> None:
    method = {"name": "fed-moe", "profile_rounds": 1, "memory_share": 1.0}
    ours = run_alone(make_config(root, "all", QUICK, {"method": method, "federation": tiers(16)}))
    everything = {"rounds": 2, "tiers": [{"top_k": 8, "share": 1.0}]}
    theirs = run_alone(make_config(root, "fedit", QUICK, {"method": {"name": "fedit"}, "federation": everything}))
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
