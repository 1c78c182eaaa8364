"""PRISM: its Gini coefficient, the two parts of a client's samples, their rounds, what it costs, and FedAvg with rho = 0.

Legend: N samples, V classes.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from dense_inputs import dense_config, write_dense
from every import every
from federations import Result, make_config, run_alone, write_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from trained import run_folder

from fedmoe_ds.clients.client import Client
from fedmoe_ds.config.schema import MethodConfig
from fedmoe_ds.errors import UserError
from fedmoe_ds.methods import ModelFacts, RoundContext, load_method, method_for, with_defaults
from fedmoe_ds.methods.prism import GINI, IMITATE, PRISM, PROBE, REINFORCE, expected_failure, gini
from fedmoe_ds.results import open_run
from fedmoe_ds.results.loaded_model import LoadedModel

NUMBERS = st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=30)


def prism(**keys: Any) -> PRISM:
    method = load_method(MethodConfig.model_validate({"name": "prism", "horizon": 10, **keys}))
    assert isinstance(method, PRISM)
    return method


@settings(max_examples=60, deadline=None)
@given(NUMBERS, st.floats(1e-3, 1e3), st.randoms())
def test_the_coefficient_is_the_mean_difference_of_pairs(values: list[float], factor: float, order: Any) -> None:
    value_N, total = np.array(values), sum(values)
    pairs = sum(abs(a - b) for a in values for b in values)
    expected = pairs / (2 * len(values) * total) if total else 0.0
    assert gini(value_N) == pytest.approx(expected, abs=1e-9)
    assert gini(factor * value_N) == pytest.approx(gini(value_N), abs=1e-9)
    shuffled = values.copy()
    order.shuffle(shuffled)
    assert gini(np.array(shuffled)) == gini(value_N), "to the bit"


def test_coefficients_that_are_known() -> None:
    assert gini(np.full(7, 3.0)) == 0.0 and gini(np.zeros(4)) == 0.0
    assert gini(np.eye(8)[3]) == pytest.approx(1 - 1 / 8)


def test_both_halves_of_a_pair_are_one_module() -> None:
    squares = {
        "attention.q_proj.lora_A": np.array([9.0]),
        "attention.q_proj.lora_B": np.array([16.0]),
        "experts.down.weight": np.array([[25.0, 0.0]]),
        "rescaler": np.array([1.0]),
    }
    assert float(prism().reduce_probe(squares)) == gini(np.array([5.0, 5.0, 0.0, 1.0]))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(0, 10), st.integers(0, 10), st.sampled_from(["concentrated", "random", "reversed"]))
def test_parts_are_disjoint_complete_and_nested(count: int, less: int, more: int, route: str) -> None:
    client, found = Client(3, "c", 2, count, count, 100, 2), {}
    known = torch.from_numpy(np.random.default_rng(count).permutation(count)).float()[None]
    for tenths in sorted((less, more)):
        method = prism(rho=tenths / 10, route=route) if tenths else prism(rho=0.0, horizon=None)
        if not tenths:
            assert not method.parts
            continue
        method.facts = ModelFacts(2, 4, 1, 7, sequences=count)
        reinforced = method.reinforced(client)
        assert (0 < reinforced < count) or tenths == 10 or count == 1
        assert abs(Fraction(reinforced) - Fraction(tenths, 10) * count) <= Fraction(1, 2) or reinforced in (0, 1, count - 1)
        parts = {
            part: method.assign(client, RoundContext(2, {GINI: known}, plan=part)).samples for part in (IMITATE, REINFORCE)
        }
        used = {part: set(range(count)) if own is None else set(own.tolist()) for part, own in parts.items()}
        if 0 < reinforced < count:
            assert not used[IMITATE] & used[REINFORCE] and len(used[IMITATE] | used[REINFORCE]) == count
            for part, own in used.items():
                assert len(own) == method._planned(client, part).trained_sequences
            best = {i for i in range(count) if known[0, i] >= count - reinforced}
            worst = {i for i in range(count) if known[0, i] < reinforced}
            assert route == "random" or used[REINFORCE] == (best if route == "concentrated" else worst)
        found[tenths] = used[REINFORCE] if reinforced else set()
    if len(found) == 2:
        assert found[min(found)] <= found[max(found)]


def test_rounds_of_reinforcement_are_the_last() -> None:
    method = prism(rho=0.3)
    assert [t for t in range(1, 14) if method.reinforces(t)] == [8, 9, 10, 11, 12, 13]
    assert [t for t in range(1, 6) if prism(rho=0.3, horizon=5).reinforces(t)] == [4, 5], "a half counts as one"
    assert all(prism(rho=1.0).reinforces(t) for t in range(1, 14))
    assert not prism(rho=1.0).probes and prism(rho=0.99).probes


def test_a_client_that_is_new_is_probed_whatever_the_round() -> None:
    known, new = (Client(i, "c", 2, 10, 10, 100, 2) for i in (3, 4))
    for route, probed in (("concentrated", 10), ("random", 0)):
        method = prism(route=route)
        for round_index, part, used in ((1, IMITATE, 7), (9, REINFORCE, 3)):
            context = SimpleNamespace(round=round_index, drawn=[known, new], memories={3: {"gini": np.array(0.5)}})
            plan = method.plan(context)  # type: ignore[arg-type]
            assert plan.parts == {3: part, 4: PROBE}
            told = {client.index: (client.trained_sequences, client.probed, client.rollouts) for client in plan.participants}
            assert told == {3: (used, 0, 8 * (part == REINFORCE)), 4: (10, probed, 0)}
        passes = method.assign(new, RoundContext(1, {}, plan=PROBE)).probe
        assert passes is None if route == "random" else [one.tolist() for one in passes or ()] == [[i] for i in range(10)]


def test_the_expected_policy_gradient_is_cross_entropy_s_times_p() -> None:
    """And equals the sum over all answers of p(a) reward(a) grad log p(a)."""
    torch.manual_seed(0)
    logits_NV, labels_N = torch.randn(6, 5, dtype=torch.float64, requires_grad=True), torch.randint(5, (6,))
    nll_N = torch.nn.functional.cross_entropy(logits_NV, labels_N, reduction="none")
    loss, sums = expected_failure(SimpleNamespace(nll_N=nll_N))  # type: ignore[arg-type]
    (found,) = torch.autograd.grad(loss, logits_NV, retain_graph=True)
    p_N = (-nll_N).exp().detach()
    (cross,) = torch.autograd.grad((p_N * nll_N).sum(), logits_NV)
    torch.testing.assert_close(found, cross, rtol=0, atol=1e-14)
    reward_NV, log_NV = torch.nn.functional.one_hot(labels_N, 5).double(), logits_NV.log_softmax(-1)
    policy = -(log_NV.exp().detach() * (reward_NV - 0.7) * log_NV).sum()  # a baseline changes nothing
    (policy_NV,) = torch.autograd.grad(policy, logits_NV)
    torch.testing.assert_close(found, policy_NV, rtol=0, atol=1e-14)
    assert sums == {}


def test_without_a_horizon_it_is_that_of_the_run(tmp_path: Path) -> None:
    for keys, horizon in (({}, 7), ({"horizon": 3}, 3), ({"rho": 0.0}, None)):
        config = make_config(tmp_path, "horizon", {"federation": {"rounds": 7}}, {"method": {"name": "prism", **keys}})
        method = method_for(config)
        assert method.params.horizon == horizon and with_defaults(config, method).method.model_dump()["horizon"] == horizon
    with pytest.raises(UserError, match=r"^method\.route: random: has no effect with method\.rho=0: all is SFT; drop the key$"):
        method_for(make_config(tmp_path, "idle", {"method": {"name": "prism", "rho": 0.0, "route": "random"}}))


SHORT: dict[str, Any] = {
    "federation": {"rounds": 3},
    "local": {"max_steps": 2},
    "evaluation": {"max_sequences": 1, "client_sequences": 0},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prism")
    write_dense(folder, ("vit",), samples=(9, 7, 5))
    write_inputs(folder, (9, 7, 5))
    return folder


def result(root: Path, name: str, *changes: dict[str, Any]) -> Result:
    return run_alone(make_config(root, name, SHORT, *changes))


def test_without_reinforcement_it_is_fedavg_to_the_bit(root: Path) -> None:
    plain = result(root, "plain", {"method": {"name": "fedit"}})
    assert result(root, "none", {"method": {"name": "prism", "rho": 0.0}}).digest == plain.digest
    assert result(root, "some", {"method": {"name": "prism"}}).digest != plain.digest


def test_what_a_run_spends_and_keeps(root: Path) -> None:
    """On devices: the probe and the rollouts take time and energy, and change no adapter."""
    on = {"devices": {"mix": {"laptop": 1.0}, "availability": "always"}}
    runs = {n: result(root, f"rollouts-{n}", on, {"method": {"name": "prism", "rollouts": n}}) for n in (0, 8)}
    assert runs[0].digest == runs[8].digest
    rows = {n: [event for event in run.events if event["event"] == "client"] for n, run in runs.items()}
    parts = runs[0].parts
    cost = parts.spec.cost
    for few, many in zip(rows[0], rows[8], strict=True):
        rolled = few["round"] == 3
        assert (
            (many["flops"] > few["flops"])
            == (many["compute_s"] > few["compute_s"])
            == (many["joules"] > few["joules"])
            == rolled
        )
        assert ("probe_tokens" in few) == (few["round"] == 1)
        if rolled:
            per_token = cost.forward(few["active_experts"], parts.config.adapters.rank)
            assert many["flops"] - few["flops"] == pytest.approx(8 * few["tokens"] * per_token, rel=1e-6)
    for client in parts.clients:
        lengths = [len(ids) for ids in parts.data.train(client.index).input_ids]
        (first,) = [row for row in rows[0] if row["round"] == 1 and row["client"] == client.name]
        assert first["probe_tokens"] == sum(lengths)
        known = parts.state.personal.state(client.index)[GINI][0]
        own = known[: client.sequences]
        assert every(0 < value < 1 for value in own.tolist()) and not known[client.sequences :].any()
        assert float(parts.state.personal.memories[client.index]["gini"]) == pytest.approx(float(own.mean()), abs=1e-6)
    # Whoever opens the run knows how many samples there were.
    opened = LoadedModel.of_run(open_run(run_folder(parts.config)))
    for client in parts.clients:
        assert torch.equal(opened.personal.state(client.index)[GINI], parts.state.personal.state(client.index)[GINI])


def test_images_route_their_samples(root: Path) -> None:
    """Classes of a vision transformer: the same bits with one client at a time, other ones by another route."""
    base = {**SHORT, "method": {"name": "prism", "rho": 0.5}}
    moe = {"adapters": {"attention": [], "moe": {"experts": 1, "width": 8, "top_k": 1}}, "federation": {"tiers": None}}
    alone, one, other = (
        run_alone(dense_config(root, "vit", f"images-{i}", base, moe, change))
        for i, change in enumerate([{}, {"execution": {"clients_in_flight": 1}}, {"method": {"route": "reversed"}}])
    )
    assert alone.digest == one.digest != other.digest
    numbers = [
        {index: memory["gini"].tobytes() for index, memory in run.parts.state.personal.memories.items()} for run in (alone, one)
    ]
    assert numbers[0] == numbers[1] and len(numbers[0]) == len(alone.parts.clients)
