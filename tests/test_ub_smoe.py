"""UB-SMoE: phi as a function of use, what clients are told, and what real runs do with both parts and without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from every import every
from federations import Result, alone, build, finish, make_config, run_alone, write_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from trained import run_folder

from fedmoe_ds.clients.client import Client
from fedmoe_ds.config import MethodConfig
from fedmoe_ds.errors import UserError
from fedmoe_ds.export.command import main
from fedmoe_ds.federation.rounds import Federation
from fedmoe_ds.methods import ROUTER_BIAS, BlockSpec, MeanContext, Method, ModelFacts, RoundContext, load_method
from fedmoe_ds.methods.fft_moe import FFTMoE
from fedmoe_ds.methods.ub_smoe import wanted

L, E, K = 2, 6, 2
PHI = BlockSpec(ROUTER_BIAS, (0, 1), (E,), trained=False)
ATTENTION = BlockSpec("attention.q_proj.lora_A", (0, 1), (4, 3), trained=False)
EPSILON = 1e-3


def method(name: str = "ub-smoe", **keys: Any) -> Method:
    found = load_method(MethodConfig.model_validate({"name": name, **keys}))
    found.facts = ModelFacts(K, E, 4, 7, layers=(0, 1))
    return found


def client(cap: int) -> Client:
    return Client(0, "c0", cap, 5, 5, 50, cap, 4, E)


# phi


@settings(max_examples=30, derandomize=True)
@given(st.lists(st.floats(0.0, 1.0), min_size=E, max_size=E).filter(lambda shares: sum(shares) > 1e-6))
def test_phi_lies_within_the_range_of_the_equation(shares: list[float]) -> None:
    used_LE = np.array([shares, shares[::-1]])
    phi_LE, target = wanted(used_LE, EPSILON), sum(shares) / E
    assert phi_LE.min() >= np.tanh(-1.0) and phi_LE.max() <= np.tanh(target / EPSILON - 1.0)
    # An expert that served fewer tokens is wished for more, and one at u* - eps is left alone.
    order = np.argsort(used_LE[0])
    assert (np.diff(phi_LE[0][order]) <= 0).all()
    assert wanted(np.full((1, E), 0.25), EPSILON) == pytest.approx(np.tanh(0.25 / 0.251 - 1.0), abs=1e-12)


def test_phi_follows_with_momentum_within_its_bound() -> None:
    counts_LE = np.array([[30, 10, 0, 20, 20, 0], [10, 10, 10, 10, 20, 20]])
    context = MeanContext(3, {}, counts_LE, 40)
    old_LE = torch.linspace(-0.5, 0.5, L * E).view(L, E)
    goal_LE = torch.from_numpy(wanted(counts_LE / 40, EPSILON))
    for zeta in (0.0, 0.9):
        new_LE = method(momentum=zeta).renew(PHI, old_LE, context)
        assert new_LE.dtype == torch.float32 and torch.allclose(new_LE.double(), zeta * old_LE + (1 - zeta) * goal_LE)
    assert method(momentum=0.0, bound=0.1).renew(PHI, old_LE, context).abs().max() == pytest.approx(0.1)
    assert torch.equal(method().renew(PHI, old_LE, MeanContext(3, {}, counts_LE * 0, 0)), old_LE), "nobody was trained"
    assert torch.equal(method().renew(ATTENTION, old_LE, context), old_LE), "what others keep still stays still"


def test_phi_points_where_fft_moe_s_global_target_does() -> None:
    """The same share of use, below or above the same mean."""
    counts_LE = np.array([[30, 10, 0, 20, 20, 0], [11, 12, 10, 13, 20, 20]])
    fft_moe = method("fft-moe", auxiliary="global")
    assert isinstance(fft_moe, FFTMoE)
    target_LE = fft_moe.targets(counts_LE).numpy()
    above_floor_LE = target_LE > target_LE.min(1, keepdims=True)
    # Without the small epsilon, which only matters at the mean itself.
    assert ((wanted(counts_LE / 40, 1e-9) > 0) == above_floor_LE).all() and above_floor_LE.any()


# What clients and models are told


def test_sparsity_scales_pseudo_gradients() -> None:
    told = [method().assign(client(cap), RoundContext(1, {})).pseudo for cap in (1, 2)]
    assert [one.factor for one in told if one is not None] == pytest.approx([1 - 1 / E, 1 - 2 / E])
    assert method().assign(client(E), RoundContext(1, {})).pseudo is None, "all experts serve every token"
    assert method(pseudo_gradient="none").assign(client(1), RoundContext(1, {})).pseudo is None
    batch = method(pseudo_gradient="batch").assign(client(1), RoundContext(1, {})).pseudo
    assert batch is not None and batch.of == "batch"


def test_candidates_are_at_least_the_model_s_own_choice() -> None:
    facts = ModelFacts(K, E, 4, 7, layers=(0, 1))
    for keys, expected in (({}, K + 2), ({"candidates": K}, K), ({"candidates": E}, E), ({"routing": "plain"}, 0)):
        one = method(**keys)
        one.check(facts)
        assert one.candidates == expected
        assert [spec.name for spec in one.blocks([])] == ([ROUTER_BIAS] if expected else [])
    narrow = method()
    narrow.check(ModelFacts(4, 5, 4, 7, layers=(0, 1)))
    assert narrow.candidates == 5
    for wrong in (K - 1, E + 1):
        message = f"^method.candidates: {wrong}: a token of this model activates up to 2 of 6 experts; use 2 to 6, or null$"
        with pytest.raises(UserError, match=message):
            method(candidates=wrong).check(facts)


# Runs

QUICK: dict[str, Any] = {
    "method": {"name": "ub-smoe", "momentum": 0.0},
    "federation": {
        "rounds": 2,
        "participation": 1.0,
        "tiers": [{"top_k": 8, "share": 1.0}, {"top_k": 2, "share": 1.0}, {"top_k": 1, "share": 1.0}],
    },
    "local": {"max_steps": 2},
    "evaluation": {"client_sequences": 0, "max_sequences": 2, "every": 9},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ub-smoe")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def whole(root: Path) -> Result:
    return run_alone(make_config(root, "whole", QUICK))


def test_use_is_conserved_and_phi_is_made_of_it(whole: Result) -> None:
    """sum_i ut_i = sum_c p_c K_c in every layer; without momentum phi is that of the last round's use."""
    counts_LE = whole.parts.state.utilisation_LE
    assert counts_LE is not None
    last = [event for event in whole.events if event["event"] == "client" and event["round"] == 2]
    assert len({event["active_experts"] for event in last}) == 3
    tokens = sum(event["tokens"] for event in last)
    assert every(row == sum(event["tokens"] * event["active_experts"] for event in last) for row in counts_LE.sum(1).tolist())
    expected_LE = wanted(counts_LE / tokens, EPSILON)
    found_LE = np.stack([whole.adapters[f"layers.{layer}.{ROUTER_BIAS}"] for layer in whole.parts.spec.expert_layout.layers])
    assert found_LE == pytest.approx(expected_LE, abs=1e-6) and np.abs(found_LE).max() > 0.1


def test_what_is_evaluated_has_phi(whole: Result) -> None:
    parts, (tier, *_) = whole.parts, whole.parts.evaluator.tiers
    before = parts.evaluator.scores(parts.state.personal, False, False, [tier])
    told = [event["loss"] for event in whole.events if event["event"] == "eval" and event["round"] == 2]
    assert [row.loss for row in before] == told[:1]
    phi = parts.state.adapters.client(ROUTER_BIAS, 0)
    kept = phi.clone()
    phi.zero_()
    without = parts.evaluator.scores(parts.state.personal, False, False, [tier])
    phi.copy_(kept)
    assert every(one.loss != other.loss for one, other in zip(before, without, strict=True))


def test_without_both_parts_it_is_fedit_to_the_bit(root: Path) -> None:
    neither = {"name": "ub-smoe", "routing": "plain", "pseudo_gradient": "none"}
    both = (run_alone(make_config(root, told["name"], {**QUICK, "method": told})) for told in (neither, {"name": "fedit"}))
    ours, theirs = both
    assert ours.digest == theirs.digest


def test_phi_of_zero_chooses_as_no_phi(root: Path) -> None:
    """In the first round: the same bits with any number of candidates."""
    one_round = {"federation": {"rounds": 1}, "evaluation": {"max_sequences": 1}}
    found = []
    for i, change in enumerate(({"routing": "plain", "momentum": 0.9}, {"candidates": 8}, {"candidates": 16})):
        parts, journal = build(make_config(root, f"first-{i}", QUICK, one_round, {"method": change}), *alone())
        Federation(parts, journal)._round(1)
        journal.close()
        found.append({key: value.clone() for key, spec, value in parts.state.adapters.items(0) if spec.name != ROUTER_BIAS})
    assert every(torch.equal(value, other[key]) for other in found[1:] for key, value in found[0].items())


def test_experts_that_nobody_used_learn(root: Path) -> None:
    """From the rows of others, where a single sequence per step leaves some without rows."""
    few = {"federation": {"rounds": 1, "tiers": [{"top_k": 1, "share": 1.0}]}, "local": {"batch_size": 1, "max_steps": 1}}
    moved = {}
    for mode in ("none", "batch"):
        config = make_config(root, f"unused-{mode}", QUICK, few, {"method": {"pseudo_gradient": mode}})
        parts, journal = build(config, *alone())
        before = {key: value.clone() for key, spec, value in parts.state.adapters.items(0) if spec.expert}
        result = finish(parts, journal)
        used_LE = parts.state.utilisation_LE
        assert used_LE is not None and (used_LE == 0).any()
        idle = [f"layers.{layer}.experts.{expert}.down.lora_B" for layer, expert in zip(*(used_LE == 0).nonzero(), strict=True)]
        moved[mode] = [not np.array_equal(result.adapters[key], before[key].numpy()) for key in idle]
    assert not any(moved["none"]) and every(moved["batch"])


WAYS: dict[str, tuple[dict[str, Any], bool]] = {
    "one client at a time": ({"clients_in_flight": 1}, True),
    "recomputed": ({"activation_checkpointing": True}, True),
    "packed": ({"packing": True}, False),
    "fast": ({"reproducible": "fast"}, False),
    "micro-batches": ({"micro_batch_size": 3}, False),
}


def test_the_same_in_every_way_to_compute_a_step(root: Path) -> None:
    """A step's probabilities are those of all its passes: plain SGD, so that no small gradient is blown up."""
    sgd = {"local": {"optimizer": "sgd", "lr": 0.1}, "execution": {"micro_batch_size": None}}

    def trained(name: str, change: dict[str, Any]) -> dict[str, np.ndarray]:
        return run_alone(make_config(root, name.replace(" ", "-"), QUICK, sgd, {"execution": change})).adapters

    expected = trained("way", {})
    without = run_alone(make_config(root, "no-pseudo", QUICK, sgd, {"method": {"pseudo_gradient": "none"}})).adapters
    moved = max(float(np.abs(value - without[key]).max()) for key, value in expected.items() if ".experts." in key)
    for way, (change, exact) in WAYS.items():
        found = trained(way, change)
        apart = max(float(np.abs(value - expected[key]).max()) for key, value in found.items())
        assert apart <= (0 if exact else 0.02 * moved), (way, apart, moved)


@pytest.mark.parametrize("form", ["peft", "merged"])
def test_no_export_has_a_place_for_phi(tmp_path: Path, whole: Result, form: str) -> None:
    message = f"^--format: {form}: method ub-smoe moves the choice of experts by a bias, .*; `fedmoe evaluate`"
    with pytest.raises(UserError, match=message):
        main([str(run_folder(whole.parts.config)), "--format", form, "--out", str(tmp_path / "out")])
