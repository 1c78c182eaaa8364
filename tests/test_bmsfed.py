"""BMSFed: who takes part with which modalities, what is minimised, and what runs do with modalities that are alike."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dense_inputs import dense_config, write_dense
from every import every
from federations import Result, alone, build, finish
from test_reference_bmsfed import CONFIG
from torch import Tensor

from fedmoe_ds.clients.client import Client
from fedmoe_ds.clients.facility_location import Facilities
from fedmoe_ds.clients.fingerprint import Projection
from fedmoe_ds.clients.update import ClientUpdate
from fedmoe_ds.config import MethodConfig
from fedmoe_ds.data import forms
from fedmoe_ds.data.forms import Dealt, Formed
from fedmoe_ds.errors import UserError
from fedmoe_ds.methods import (
    BlockSpec,
    LocalStep,
    ModelFacts,
    PlanContext,
    Predictions,
    RoundContext,
    RoundPlan,
    Statistic,
    load_method,
    method_for,
)
from fedmoe_ds.methods.bmsfed import BOTH, FINGERPRINT, LIKENED, LIKENESS, NUMBERS, PROTOTYPES, BMSFed

CLASSES, WIDTH, BATCH = 4, 6, 5
FACTS = ModelFacts(1, 2, 4, 7, layers=(0, 1), classes=CLASSES, width=WIDTH)


def method_of(**keys: Any) -> BMSFed:
    found = load_method(MethodConfig.model_validate({"name": "bmsfed", **keys}))
    assert isinstance(found, BMSFed)
    found.facts = FACTS
    return found


def clients(count: int) -> list[Client]:
    return [Client(i, f"c{i}", 1, 3 + i, 5, 5, experts=2) for i in range(count)]


def memories(count: int, likeness: tuple[float, float]) -> dict[int, dict[str, np.ndarray]]:
    draw = np.random.default_rng(count)
    return {i: {FINGERPRINT: draw.standard_normal((2, NUMBERS)), LIKENESS: np.array(likeness)} for i in range(count)}


def planned(method: BMSFed, known: dict[int, dict[str, np.ndarray]], count: int, clients_: int, number: int = 5) -> RoundPlan:
    everyone = clients(clients_)
    return method.plan(PlanContext(number, everyone[:count], everyone, known))


# Who takes part


def test_whom_nobody_has_seen_comes_first_with_both() -> None:
    known = memories(4, (0.9, 0.3))
    plan = planned(method_of(), known, 3, 9)
    assert len(plan.participants) == 3 and every(client.index >= 4 for client in plan.participants)
    assert set(plan.parts.values()) == {BOTH} and every(client.experts == 2 for client in plan.participants)
    # Two are left to be seen: the third is chosen by what is known.
    some = planned(method_of(), memories(7, (0.9, 0.3)), 3, 9)
    assert {7, 8} < some.parts.keys() and [own for i, own in some.parts.items() if i < 7] == [(1,)]
    assert planned(method_of(), known, 3, 9) == plan != planned(method_of(), known, 3, 9, number=7)


@pytest.mark.parametrize("likeness", [(0.9, 0.3), (0.3, 0.9)])
def test_without_a_threshold_it_is_plain_facility_location(likeness: tuple[float, float]) -> None:
    """Candidates are all that are left where a tenth and the participants are as many."""
    known = memories(4, likeness)
    plan = planned(method_of(threshold=math.inf), known, 4, 4)
    assert set(plan.parts.values()) == {BOTH} and plan.parts.keys() == set(range(4))
    method, places = method_of(threshold=math.inf), Facilities(np.stack([known[i][FINGERPRINT].ravel() for i in range(4)]))
    found = method._greedy(1, 2, places, Facilities(np.stack([known[i][FINGERPRINT][0] for i in range(4)])), np.full(4, 9.0))
    again = Facilities(places.points_ND)
    for pick, (place, kind) in enumerate(found):
        candidates = method._candidates(1, pick, [i for i in range(4) if i not in [one for one, _ in found[:pick]]], 2)
        assert kind is places and len(candidates) == 2 and place == again.best(candidates)
        again.choose(place)


@pytest.mark.parametrize(("likeness", "weak"), [((0.9, 0.3), 1), ((0.3, 0.9), 0)])
def test_the_weaker_modality_is_trained_alone_above_the_threshold(likeness: tuple[float, float], weak: int) -> None:
    known = memories(12, likeness)
    alone_, both = (planned(method_of(threshold=limit), known, 4, 12) for limit in (2.9, 3.1))
    assert set(alone_.parts.values()) == {(weak,)} and set(both.parts.values()) == {BOTH}
    assert [client.experts for client in alone_.participants] == [1] * 4, "it costs what it trains"
    told = method_of().assign(clients(1)[0], RoundContext(5, {}, plan=(weak,)))
    assert told.views == (weak,) and told.fused and told.members_MLE is not None
    assert told.members_MLE.shape == (1, 2, 2) and told.members_MLE[0, :, weak].all() and told.members_MLE.sum() == 2
    # Before both modalities were likened to prototypes nobody is ahead.
    assert set(planned(method_of(), memories(12, (0.9, 0.0)), 4, 12).parts.values()) == {BOTH}


def test_a_random_choice_is_of_those_who_are_drawn() -> None:
    plan = planned(method_of(selection="random"), memories(9, (0.9, 0.1)), 3, 9)
    assert [client.index for client in plan.participants] == [0, 1, 2] and set(plan.parts.values()) == {BOTH}


# What is minimised


def given(own: tuple[int, ...], alike: bool = False, last: bool = True) -> Predictions:
    torch.manual_seed(3)
    rows = len(own) * BATCH
    hidden_ND, logits_NV = torch.randn(rows, WIDTH), torch.randn(rows, CLASSES)
    if alike:
        hidden_ND, logits_NV = (value[:BATCH].repeat(len(own), 1) for value in (hidden_ND, logits_NV))
    labels_N = torch.tensor([0, 1, 2, 1, 0] * len(own))
    nll_N, none_N = F.cross_entropy(logits_NV, labels_N, reduction="none"), torch.zeros(rows, dtype=torch.int64)
    step = LocalStep(BATCH, last_epoch=last)
    return Predictions(labels_N, nll_N, hidden_ND.requires_grad_(), none_N, none_N, {}, step, logits_NV.requires_grad_())


def prototypes(known: bool = True, alike: bool = False) -> Statistic:
    torch.manual_seed(4)
    value, there = torch.randn(2 * CLASSES, WIDTH), torch.full((2 * CLASSES,), known)
    if alike:
        value = value[:CLASSES].repeat(2, 1)
    return Statistic(value, there)


def minimised(method: BMSFed, rows: Predictions, own: tuple[int, ...], shared: Statistic) -> tuple[Tensor, dict[str, Tensor]]:
    told = method.assign(clients(1)[0], RoundContext(2, {}, plan=own))
    objective = method.objective(clients(1)[0], told, RoundContext(2, {}, plan=own, statistics={PROTOTYPES: shared}))
    assert objective is not None and objective.loss is not None
    return objective.loss(rows)


def plain(rows: Predictions, members: int) -> Tensor:
    mean_BC = rows.logits_NV.view(members, BATCH, CLASSES).mean(0)
    return F.cross_entropy(mean_BC, rows.labels_N[:BATCH], reduction="sum")


@pytest.mark.parametrize("own", [(0, 1), (0,), (1,)])
def test_without_alpha_or_prototypes_it_is_cross_entropy(own: tuple[int, ...]) -> None:
    rows = given(own)
    for method, shared in ((method_of(alpha=0.0), prototypes()), (method_of(), prototypes(known=False))):
        loss, _ = minimised(method, rows, own, shared)
        assert torch.equal(loss, plain(rows, len(own)))


def test_the_weaker_modality_is_enhanced_and_of_equal_ones_none() -> None:
    rows, shared = given(BOTH), prototypes()
    loss, sums = minimised(method_of(alpha=2.0), rows, BOTH, shared)
    by_modality = []
    for modality in BOTH:
        apart_BC = torch.cdist(rows.hidden_ND[modality * BATCH :][:BATCH], shared.value[modality * CLASSES :][:CLASSES])
        by_modality.append(F.cross_entropy(-apart_BC, rows.labels_N[:BATCH], reduction="none"))
    right = [float(torch.exp(-own).sum().detach()) for own in by_modality]
    weak = int(right[1] < right[0])
    expected = (plain(rows, 2) + 2.0 * by_modality[weak].sum()).detach()
    assert right[0] != right[1] and float(loss.detach()) == pytest.approx(float(expected), rel=1e-6)
    (grad_ND,) = torch.autograd.grad(loss, rows.hidden_ND)
    assert grad_ND[weak * BATCH :][:BATCH].any() and not grad_ND[(1 - weak) * BATCH :][:BATCH].any()
    assert sums[LIKENESS].tolist() == pytest.approx(right) and sums[LIKENED].tolist() == [BATCH, BATCH]
    equal = given(BOTH, alike=True)
    loss, sums = minimised(method_of(alpha=2.0), equal, BOTH, prototypes(alike=True))
    assert torch.equal(loss, plain(equal, 2)) and sums[LIKENESS][0] == sums[LIKENESS][1]


def test_a_modality_alone_is_always_enhanced() -> None:
    rows, shared = given((1,)), prototypes()
    loss, sums = minimised(method_of(), rows, (1,), shared)
    apart_BC = torch.cdist(rows.hidden_ND, shared.value[CLASSES:])
    expected = plain(rows, 1) + F.cross_entropy(-apart_BC, rows.labels_N, reduction="sum")
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert sums[LIKENESS][0] == 0 and sums[LIKENED].tolist() == [0, BATCH]
    # A feature on its prototype has a distance without a gradient; a class that one modality lacks counts for neither.
    on_it = replace(rows, hidden_ND=shared.value[CLASSES:][rows.labels_N].clone().requires_grad_())
    loss, _ = minimised(method_of(), on_it, (1,), shared)
    assert torch.isfinite(torch.autograd.grad(loss, on_it.hidden_ND)[0]).all()
    lacking = replace(shared, known=torch.tensor([True, False, True, True] + [True] * 4))
    assert minimised(method_of(), rows, (1,), lacking)[1][LIKENED].tolist() == [0, 3]
    assert minimised(method_of(), given((1,), last=False), (1,), shared)[1][LIKENED].tolist() == [0, 0]


def test_what_is_known_of_a_modality_that_is_not_trained_stays() -> None:
    method, (client,), draw = method_of(), clients(1), np.random.default_rng(0)
    counts_LE = np.ones((2, 2), dtype=np.int64)
    prints_LEJ = draw.standard_normal((2, 2, NUMBERS))
    observed = {LIKENESS: np.array([0.0, 3.0]), LIKENED: np.array([0.0, 6.0])}
    update = ClientUpdate(
        client, 0, 0, 1, 10, counts_LE, True, observed=observed, measured={FINGERPRINT: prints_LEJ}, plan=(1,)
    )
    first = method.memorise(update)
    assert not first[FINGERPRINT][0].any() and np.allclose(first[FINGERPRINT][1], prints_LEJ[0, 1] + prints_LEJ[1, 1])
    assert first[LIKENESS].tolist() == [0.0, 0.5]
    update.memory, update.plan, update.observed = first, (0,), {LIKENESS: np.array([4.0, 0.0]), LIKENED: np.array([5.0, 0.0])}
    second = method.memorise(update)
    assert second[LIKENESS].tolist() == [0.8, 0.5] and np.array_equal(second[FINGERPRINT][1], first[FINGERPRINT][1])


def test_fingerprints_keep_distances() -> None:
    """Of 300 pairs the squared distance on average, and none of them by more than half."""
    projection, draw = Projection(3, NUMBERS), np.random.default_rng(1)
    specs = [BlockSpec("inner", (0, 1), (9, 7), expert=True), BlockSpec("outer", (0, 1), (7, 9), expert=True)]
    ratios = []
    for _ in range(300):
        values = {spec.name: torch.from_numpy(draw.standard_normal((2, 1, *spec.item))) for spec in specs}
        view: Any = SimpleNamespace(
            blocks=lambda: specs,
            value=lambda spec, values=values: values[spec.name],
            received=lambda spec: torch.zeros(1, dtype=torch.float64),
            first_expert=1,
        )
        whole = sum(float(value.square().sum()) for value in values.values())
        ratios.append(float(projection.changes(view).sum(0).square().sum()) / whole)
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.05) and every(0.4 < ratio < 1.7 for ratio in ratios)


# Runs


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bmsfed")
    write_dense(folder, ("vit-rgb",))
    return folder


def config_of(root: Path, name: str, *changes: dict[str, Any]) -> Any:
    return dense_config(root, "vit-rgb", name, CONFIG, *changes)


def expert(result: Result, number: int) -> dict[str, np.ndarray]:
    return {
        key.replace(f".experts.{number}.", ".experts.E."): value
        for key, value in result.adapters.items()
        if f".experts.{number}." in key
    }


def test_modalities_that_are_alike_stay_so(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same view twice, read by experts that begin alike: no modality is ahead, none is ever trained alone.

    Up to rounding, since the rows of the two lie at other places in memory; enhanced would be whichever that is against.
    """

    def twice(dealt: Dealt, config: Any) -> Formed:
        return Formed(np.repeat(dealt.pixels_NCHW, 6, 1))

    monkeypatch.setitem(forms.FORMS, "grey-and-colour", replace(forms.FORMS["grey-and-colour"], make=twice))
    change = {
        "foundation": {"cache": str(root / "twice")},
        "data": {"form": {"spread": 0.5}},
        "method": {"threshold": 1.001, "alpha": 0.0},
    }
    parts, journal = build(config_of(root, "alike", change), *alone())
    for name, spec in parts.state.adapters.specs.items():
        if spec.expert:
            value = parts.state.adapters.client(name, 0)
            value[:, 1] = value[:, 0]
    plans = [parts.planning.of(1)]
    of = parts.planning.of
    parts.planning.of = lambda index: plans.append(of(index)) or plans[-1]  # type: ignore[method-assign, func-returns-value]
    result = finish(parts, journal)
    assert {own for plan in plans for own in plan.parts.values()} == {BOTH}
    known = [memory[LIKENESS] for memory in result.parts.state.personal.memories.values()]
    assert every(own[0] == pytest.approx(own[1], rel=1e-5) for own in known) and any(own[0] > 0 for own in known)
    ours, theirs = expert(result, 0), expert(result, 1)
    assert ours.keys() == theirs.keys() and every(np.allclose(v, theirs[key], rtol=1e-4, atol=1e-6) for key, v in ours.items())


def test_an_expert_that_nobody_trains_keeps_its_bits(root: Path) -> None:
    parts, journal = build(config_of(root, "one", {"local": {"weight_decay": 0.5}}), *alone())
    method = parts.spec.method
    start = {key: value.numpy().copy() for key, _, value in parts.state.adapters.items(0)}
    plan = method.plan
    method.plan = lambda context: replace(  # type: ignore[method-assign]
        made := plan(context), parts=dict.fromkeys(made.parts, (1,))
    )
    result = finish(parts, journal)
    for key, value in result.adapters.items():
        assert (value.tobytes() == start[key].tobytes()) == (".experts.1." not in key), key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapters": {"moe": {"experts": 3}}}, r"^adapters\.moe\.experts: 3: BMSFed has .* two modalities; use 2$"),
        ({"federation": {"tiers": [{"experts": 1, "share": 1.0}]}}, r"^federation\.tiers\.0\.experts: 1: .*; drop the key$"),
        ({"federation": {"sampling": "size"}}, r"^federation\.sampling: size: BMSFed chooses .*; use uniform"),
        ({"devices": {"mix": {"phone-mid": 1.0}}}, r"^devices: BMSFed chooses among all clients.*; drop the section"),
        ({"execution": {"micro_batch_size": 1}}, r"^execution\.micro_batch_size: 1: method bmsfed weighs a whole step"),
        (
            {"data": {"form": {"kind": "plain"}}},
            r"^data\.form\.kind: plain: images have 1 view, and the models of method bmsfed read 2 views; use grey-and-colour$",
        ),
        (
            {"method": {"name": "split-mix"}},
            r"^data\.form\.kind: grey-and-colour: images have 2 views, and the models of method split-mix read 1 view; use ",
        ),
        (
            {"method": {"selection": "random", "threshold": 2.0}},
            r"^method\.threshold: 2\.0: has no effect with .*; drop the key$",
        ),
    ],
)
def test_refusals(root: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        method_for(config_of(root, "refused", change))
