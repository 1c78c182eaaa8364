"""RaFFM: rounds against a dense model with sliced matrices; full clients are FedAvg, zeros are holders' means times a share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_inputs import dense_config, write_dense
from every import every
from federations import alone, build, finish, run_alone
from reference_dense import Settings
from reference_inputs import TOLERANCE, check_equal
from reference_raffm import RaFFMReference, random_widths
from test_reference_fft_moe import EPS, SAMPLES, SGD, samples_of, tasks

from fedmoe_ds.clients.client import Client
from fedmoe_ds.config import Config
from fedmoe_ds.config.schema import MethodConfig
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation.traffic import Traffic
from fedmoe_ds.methods import ModelFacts, PlanContext, RoundContext, load_method, method_for

pytestmark = pytest.mark.timeout(600)

EXPERTS = 4
WHOLE: dict[str, Any] = {
    "foundation": {"convert": {"experts": EXPERTS}},
    "adapters": {"moe": None, "expert_training": "full"},
    "evaluation": {"client_sequences": 0},
}
TIERS: dict[str, Any] = {"federation": {"tiers": [{"top_k": width, "share": 1.0} for width in (4, 3, 1)]}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raffm")
    write_dense(folder, samples=SAMPLES)
    return folder


def config_of(root: Path, family: str, tag: str, *changes: dict[str, Any]) -> Config:
    few = {"data": {"partition": {"clients": 3}}} if family == "vit" else {}
    cache = {"foundation": {"cache": str(root / "cache")}}
    return dense_config(
        root, family, f"raffm-{tag}", WHOLE, TIERS, {"method": {"name": "raffm"}, "seed": 1}, few, cache, *changes
    )


# (family, method, local training)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama-holders": ("llama", {}, {**SGD, "weight_decay": 0.1, "clip": 0.5}),
    "llama-random-zero": ("llama", {"widths": "random", "missing": "zero"}, {}),
    "vit-zero": ("vit", {"missing": "zero"}, {"clip": 0.5}),
    "vit-random": ("vit", {"widths": "random"}, {"weight_decay": 0.1}),
}
MICRO = {"vit-zero": 2}


@pytest.mark.parametrize("case", CASES)
def test_same_rounds(root: Path, case: str) -> None:
    family, method, local = CASES[case]
    local = {"clip": None, "eps": EPS, "lr": 5e-3, **local}
    run = {"execution": {"micro_batch_size": MICRO.get(case)}}
    parts, journal = build(config_of(root, family, case, {"method": method, "local": local}, run), *alone())
    told = Settings(experts=EXPERTS, top_k=EXPERTS, auxiliary="none", micro=MICRO.get(case), **local)
    expected = RaFFMReference(root / family, told, method.get("missing", "holders"))
    widths = {client.index: [client.cap] * expected.layers for client in parts.clients}
    assert sorted(width[0] for width in widths.values()) == [1, 3, 4]
    for round_index in (1, 2):
        if "widths" in method:
            widths = random_widths(1, round_index, sorted(widths), [1, 3, 4], EXPERTS, expected.layers)
        expected.round_of(tasks(parts, round_index), widths)
    result = finish(parts, journal)
    check_equal(expected.adapters, {key: torch.from_numpy(value) for key, value in result.adapters.items()})
    held = samples_of(parts.data.global_holdout())[: parts.config.evaluation.max_sequences]
    scored = {event["tier"]: event["loss"] for event in result.events if event["event"] == "eval" and event["round"] == 2}
    assert scored.keys() == {4, 3, 1}
    assert every(scored[width] == pytest.approx(expected.evaluate(held, width), rel=TOLERANCE) for width in scored)


@pytest.mark.parametrize("family", ["llama", "vit"])
def test_full_clients_are_fedavg_to_the_bit(root: Path, family: str) -> None:
    """Also where one group is the whole block, and whatever a missing group would count as."""
    for experts in (1, EXPERTS):
        everybody = {"federation": {"tiers": [{"share": 1.0}]}, "foundation": {"convert": {"experts": experts}}}
        methods = ({"name": "raffm"}, {"name": "raffm", "missing": "zero"}, {"name": "fedit"})
        found = [
            run_alone(config_of(root, family, f"full-{experts}-{i}", everybody, {"method": method})).digest
            for i, method in enumerate(methods)
        ]
        assert len({*found}) == 1, (experts, found)


def test_a_group_of_one_is_the_block(root: Path) -> None:
    """E = 1 and four full groups are the same mathematics: matrices in one piece, or in four."""
    tier = {"federation": {"tiers": [{"share": 1.0}]}, "local": {"optimizer": "sgd", "lr": 0.05, "clip": None}}
    whole, cut = (
        run_alone(config_of(root, "vit", f"pieces-{experts}", tier, {"foundation": {"convert": {"experts": experts}}}))
        for experts in (1, EXPERTS)
    )
    for layer in range(2):
        inner = [cut.adapters[f"layers.{layer}.experts.{e}.inner.weight"] for e in range(EXPERTS)]
        outer = [cut.adapters[f"layers.{layer}.experts.{e}.outer.weight"] for e in range(EXPERTS)]
        assert np.allclose(np.concatenate(inner), whole.adapters[f"layers.{layer}.experts.0.inner.weight"], atol=1e-6)
        assert np.allclose(np.concatenate(outer, 1), whole.adapters[f"layers.{layer}.experts.0.outer.weight"], atol=1e-6)


def test_zero_is_holders_times_their_share(root: Path) -> None:
    once = {"federation": {"rounds": 1}}
    holders, zero = (
        run_alone(config_of(root, "vit", f"share-{missing}", once, {"method": {"missing": missing}}))
        for missing in ("holders", "zero")
    )
    clients = holders.parts.clients
    every_sample, shares = sum(client.samples for client in clients), set()
    for key, value in holders.adapters.items():
        share = sum(client.samples for client in clients if int(key.split(".")[3]) < client.cap) / every_sample
        shares.add(share)
        assert np.allclose(zero.adapters[key], share * value, rtol=1e-6, atol=1e-9), key
    assert len(shares) == 3 and max(shares) == 1.0


def test_a_client_is_sent_its_groups_alone(root: Path) -> None:
    parts, journal = build(config_of(root, "vit", "sent"), *alone())
    journal.close()
    traffic, method = Traffic(parts.spec, parts.clients, 3), parts.spec.method
    down, up = traffic.of(1)
    assert down == up > 0
    for client in parts.clients:
        told = method.assign(client, RoundContext(1, {}))
        assert traffic.of(1, told) == (down * client.cap // EXPERTS, up * client.cap // EXPERTS), client.cap
        assert (told.allowed_LE is None) == (client.cap == EXPERTS)


def test_drawn_widths() -> None:
    """In every round one client has everything and one the smallest width; the others' differ between layers."""
    method = load_method(MethodConfig.model_validate({"name": "raffm", "widths": "random"}))
    method.facts = ModelFacts(8, 8, 1, seed=3, layers=tuple(range(6)))
    clients = [Client(i, str(i), cap, 5, 5, 5, cap=cap, tier=str(cap)) for i, cap in enumerate((8, 5, 5, 3, 3, 8))]
    seen = []
    for round_index in range(1, 9):
        plan = method.plan(PlanContext(round_index, clients, clients, {}))
        widths = {index: tuple(width_L.tolist()) for index, width_L in plan.parts.items()}
        assert widths == {i: tuple(w) for i, w in random_widths(3, round_index, [*range(6)], [3, 5, 8], 8, 6).items()}
        assert (8,) * 6 in widths.values() and (3,) * 6 in widths.values()
        assert {value for width in widths.values() for value in width} == {3, 5, 8}
        seen.append(widths)
        told = method.assign(clients[0], RoundContext(round_index, {}, plan=plan.parts[0]))
        held_L = [8] * 6 if told.allowed_LE is None else told.allowed_LE.sum(1).tolist()
        assert held_L == plan.parts[0].tolist() and told.cap == max(held_L)
    assert len({tuple(sorted(widths.items())) for widths in seen}) == 8
    alone_ = method.plan(PlanContext(1, clients[:1], clients, {}))
    assert alone_.parts[0].tolist() == [8] * 6


def test_without_groups_it_is_refused(root: Path) -> None:
    with pytest.raises(UserError, match=r"^foundation.convert: null: RaFFM trains groups of a dense foundation's"):
        method_for(dense_config(root, "vit", "refused", {"method": {"name": "raffm"}, "adapters": {"moe": None}}))
