"""Flux: roles under a budget, utilities that no batch decides, attention that tokens receive, and FedIT with everything tuned.

Legend: L layers, E experts.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from every import every
from federations import Result, alone, build, make_config, run_alone, write_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from fedmoe_ds.clients.client import Client
from fedmoe_ds.clients.hooks import LocalTrainingHooks
from fedmoe_ds.clients.update import Probed
from fedmoe_ds.config.schema import MethodConfig
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation.build import Parts
from fedmoe_ds.federation.schedule import schedule
from fedmoe_ds.methods import (
    Assignment,
    ModelFacts,
    RoundContext,
    Routing,
    RoutingObserver,
    load_method,
    method_for,
    with_defaults,
)
from fedmoe_ds.methods.flux import Flux, Roles, attention_by_expert

SHORT: dict[str, Any] = {
    "federation": {"rounds": 2},
    "local": {"max_steps": 2},
    "evaluation": {"max_sequences": 1, "client_sequences": 0},
}


def flux(layers: int = 3, experts: int = 5, **keys: Any) -> Flux:
    method = load_method(MethodConfig.model_validate({"name": "flux", "horizon": 10, **keys}))
    assert isinstance(method, Flux)
    method.facts = ModelFacts(2, experts, 4, 7, layers=tuple(range(layers)))
    return method


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux")
    write_inputs(folder, (9, 7, 5))
    return folder


def result(root: Path, name: str, *changes: dict[str, Any]) -> Result:
    return run_alone(make_config(root, name, SHORT, *changes))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.integers(1, 12), st.integers(0, 10**6))
def test_roles_are_the_best_of_the_budget_and_others_by_lot(own: int, exploit: float, round_index: int, seed: int) -> None:
    method = flux(exploit=exploit, horizon=None if exploit == 1 else 10)
    worth_LE = np.random.default_rng(seed).integers(0, 6, (3, 5)).astype(float)
    client = Client(2, "c", 2, 9, 9, 90, 2, experts=own)
    for memories in ({}, {2: {"worth": worth_LE}}):
        context = SimpleNamespace(round=round_index, drawn=[client], memories=memories)
        plan = method.plan(context)  # type: ignore[arg-type]
        tuned_LE = plan.parts[2].tuned_LE
        budget = 3 * own
        assert tuned_LE.sum() == budget and plan.participants[0].probed == 4
        eps = min(1.0, exploit + (1 - exploit) * round_index / 10)
        count = int(eps * budget + 1e-9) if memories else 0
        ranked = sorted(range(15), key=lambda place: (-worth_LE.ravel()[place], place))  # of equal ones the first
        assert tuned_LE.ravel()[ranked[:count]].all()
        if memories and eps == 1.0:  # no exploration
            assert set(np.flatnonzero(tuned_LE)) == set(ranked[:budget])
        assert np.array_equal(tuned_LE, method.plan(context).parts[2].tuned_LE)  # type: ignore[arg-type]
    others = [method.roles(replace(client, index=i), SimpleNamespace(round=1, memories={})) for i in range(40)]  # type: ignore[arg-type]
    assert own == 5 or len({roles.tuned_LE.tobytes() for roles in others}) > 1


def test_what_is_explored_shrinks_to_nothing() -> None:
    method = flux(exploit=0.3)
    assert [method.exploited(10, r) for r in (1, 5, 9, 10, 11)] == [3, 6, 9, 10, 10]
    assert flux(exploit=1.0, horizon=None).exploited(10, 1) == 10


def test_a_utility_is_tokens_times_the_root_of_the_mean_square() -> None:
    """Over samples that reach the expert; with the light form, of those that are tuned, and what was known of the others."""
    square_BLE = np.array([[[4.0, 0.0, 0.0]], [[16.0, 9.0, 0.0]]])
    update = SimpleNamespace(
        probed=Probed(square_BLE, 40, np.array([[7, 3, 0]])), counts_LE=np.array([[70, 30, 5]]), tokens=100, memory={}
    )
    assert flux(1, 3).utility(update).tolist() == [[7 * np.sqrt(10.0), 9.0, 0.0]]  # type: ignore[arg-type]
    light = flux(1, 3, samples=0)
    update.probed = Probed(square_BLE[:1], 0, np.zeros((1, 3), np.int64))
    assert light.utility(update).tolist() == [[140.0, 0.0, 0.0]]  # type: ignore[arg-type]
    update.memory = {"worth": np.array([[1.0, 2.0, 3.0]])}
    assert light.utility(update).tolist() == [[140.0, 2.0, 3.0]]  # type: ignore[arg-type]


def test_everything_tuned_is_fedit_to_the_bit(root: Path) -> None:
    """Attention that is looked at, and a probe, change nothing."""
    plain = result(root, "plain", {"method": {"name": "fedit"}, "federation": {"budget": "top_k", "tiers": None}})
    tiers = {"federation": {"tiers": [{"experts": 16, "share": 1.0}]}}
    everybody = result(root, "everybody", {"method": {"name": "fedit"}, "federation": {"tiers": [{"top_k": 8, "share": 1.0}]}})
    assert everybody.digest != plain.digest
    for i, keys in enumerate([{}, {"samples": 0}, {"score": "importance"}, {"score": "frequency"}, {"score": "random"}]):
        assert result(root, f"all-{i}", tiers, {"method": {"name": "flux", **keys}}).digest == everybody.digest, keys


def test_what_is_not_tuned_does_not_move(root: Path) -> None:
    """Neither at the client, nor in the mean where nobody tuned it; and nothing of it is sent."""
    few = {"federation": {"tiers": [{"experts": 2, "share": 1.0}], "rounds": 1}, "local": {"weight_decay": 0.5}}
    on = {"devices": {"mix": {"laptop": 1.0}, "availability": "always"}}
    run = result(root, "few", few, on, {"method": {"name": "flux"}})
    parts, before = run.parts, build(make_config(root, "before", SHORT, few, {"method": {"name": "flux"}}), *alone())[0]
    tuned_LE = np.any([parts.planning.part(client.index, 1).tuned_LE for client in parts.clients], axis=0)
    assert 0 < tuned_LE.sum() < tuned_LE.size
    moved = 0
    for spec in parts.state.adapters.specs.values():
        if spec.expert:
            ours, theirs = (one.state.adapters.client(spec.name, 0) for one in (parts, before))
            for layer, expert in np.ndindex(*tuned_LE.shape):
                same = torch.equal(ours[layer, expert], theirs[layer, expert])
                assert same or tuned_LE[layer, expert]
                moved += not same
    assert moved
    rows = [event for event in run.events if event["event"] == "client"]
    assert every(row["up_bytes"] < row["down_bytes"] and row["probe_tokens"] > 0 for row in rows)


def utilities(root: Path, name: str, *changes: dict[str, Any]) -> dict[int, bytes]:
    one = {"federation": {"rounds": 1, "tiers": [{"experts": 5, "share": 1.0}]}, "method": {"name": "flux"}}
    return {index: memory["worth"].tobytes() for index, memory in _memories(result(root, name, one, *changes)).items()}


def _memories(run: Result) -> dict[int, dict[str, np.ndarray]]:
    return run.parts.state.personal.memories


def test_no_batch_and_no_wave_decides_a_utility(root: Path) -> None:
    expected = utilities(root, "u")
    for i, change in enumerate(
        [{"local": {"batch_size": 2}}, {"execution": {"micro_batch_size": 1}}, {"execution": {"clients_in_flight": 1}}]
    ):
        assert utilities(root, f"u-{i}", change) == expected, change
    assert utilities(root, "u-samples", {"method": {"samples": 3}}) != expected


def test_frequency_and_importance_are_of_the_round_s_training(root: Path) -> None:
    whole = {"federation": {"rounds": 1, "tiers": [{"experts": 16, "share": 1.0}]}}
    for score in ("frequency", "importance"):
        run = result(root, score, whole, {"method": {"name": "flux", "score": score}})
        shares = [memory["worth"].sum(1) for memory in _memories(run).values()]
        # Every token goes to eight experts of a layer; what it receives from the others sums to one per head and sequence.
        assert score != "frequency" or every(np.allclose(share, 8.0) for share in shares)
        assert every((share > 0).all() for share in shares)
        one = result(
            root, f"{score}-1", whole, {"method": {"name": "flux", "score": score}, "execution": {"clients_in_flight": 1}}
        )
        assert every(
            np.array_equal(memory["worth"], _memories(one)[index]["worth"]) for index, memory in _memories(run).items()
        )


def test_attention_is_that_of_the_tokens_at_an_expert() -> None:
    """By loops over tokens and their slots, of which some are not kept."""
    torch.manual_seed(3)
    experts_TK = torch.stack([torch.randperm(5)[:3] for _ in range(9)])
    kept_TK, attention_T = torch.rand(9, 3) > 0.3, torch.rand(9)
    found_E = attention_by_expert(5, Routing(torch.zeros(9, 5), kept_TK.float(), experts_TK, kept_TK), attention_T)["attention"]
    expected = [0.0] * 5
    for token, slot in kept_TK.nonzero().tolist():
        expected[int(experts_TK[token, slot])] += float(attention_T[token])
    assert found_E.dtype == torch.float64 and found_E.tolist() == pytest.approx(expected) and not kept_TK.all()


@pytest.fixture(scope="module")
def parts(root: Path) -> Parts:
    found, journal = build(make_config(root, "attention", SHORT, {"method": {"name": "flux", "score": "importance"}}), *alone())
    journal.close()
    return found


def test_attention_is_that_of_the_model(root: Path, parts: Parts) -> None:
    """Of Hugging Face's own weights, sequence by sequence, layer by layer."""
    seen: dict[int, list[torch.Tensor]] = {}

    def observer(client: Client, assignment: Assignment) -> RoutingObserver:
        def attended(routing: Any, attention_T: torch.Tensor) -> dict[str, torch.Tensor]:
            assert not torch.is_grad_enabled(), "sums of a round would keep the graphs of all its passes"
            seen.setdefault(client.index, []).append(attention_T.clone())
            return {"attention": torch.zeros(routing.probs_TE.shape[1], dtype=torch.float64)}

        return RoutingObserver(attended=attended)

    parts.trainer.hooks = LocalTrainingHooks(
        observer=observer, observes=("attention",), batches=lambda client, _: [np.arange(2)]
    )
    ((wave,),) = schedule(parts.clients, parts.spec.cost, parts.config.local, 1, 1, None)
    parts.trainer.train(wave, 1, parts.state.adapters, parts.state.personal.state, parts.data.train)
    model: Any = AutoModelForCausalLM.from_pretrained(root / "model", attn_implementation="eager").eval()
    for client in parts.clients:
        assert len(seen[client.index]) == parts.spec.size.layers
        for place, sequence in enumerate(parts.data.train(client.index).input_ids[:2]):
            with torch.no_grad():
                weights = model(torch.from_numpy(np.array(sequence))[None], output_attentions=True).attentions
            lengths = [len(ids) for ids in parts.data.train(client.index).input_ids[:2]]
            rows = slice(sum(lengths[:place]), sum(lengths[: place + 1]))
            for layer, found in enumerate(seen[client.index]):
                # Adapters begin with B = 0: the model is the foundation.
                torch.testing.assert_close(found[rows], weights[layer][0].mean(1).sum(0), rtol=1e-4, atol=1e-6)


def test_without_a_horizon_it_is_that_of_the_run(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], int | None]] = [
        ({}, 2),
        ({"horizon": 3}, 3),
        ({"exploit": 1.0}, None),
        ({"score": "random"}, None),
    ]
    for keys, horizon in cases:
        config = make_config(tmp_path, "horizon", SHORT, {"method": {"name": "flux", **keys}})
        method = method_for(config)
        assert method.params.horizon == horizon and with_defaults(config, method).method.model_dump()["horizon"] == horizon
    packed = {"execution": {"packing": True, "micro_batch_size": None}, "method": {"name": "flux", "score": "importance"}}
    with pytest.raises(UserError, match=r"^execution\.packing: true: method flux asks how much attention .*; use false$"):
        method_for(make_config(tmp_path, "packed", packed))


def test_an_evaluation_follows_no_plan() -> None:
    method, client = flux(), Client(2, "c", 2, 9, 9, 90, 2, experts=2)
    assert method.assign(client, RoundContext(0, {})).trained_LE is None
    told = method.assign(client, RoundContext(1, {}, plan=Roles(np.eye(3, 5, dtype=bool))))
    assert told.trained_LE is not None and told.probe is not None and len({int(one[0]) for one in told.probe}) == 4
