"""Split-Mix and SHEFL: who trains which base models, weights, what is sent, and what real runs do with budgets."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from dense_inputs import EXPERTS, dense_config, write_dense
from every import every
from federations import Result, alone, build, run_alone
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_ensembles import base_models
from test_evaluate_command import FIELDS, of_round, rows_of
from test_export_merged import request

from fedmoe_ds.aggregation.sparse_changes import kept_of, largest_changes
from fedmoe_ds.clients.client import Client
from fedmoe_ds.clients.update import ClientUpdate
from fedmoe_ds.config import MethodConfig
from fedmoe_ds.errors import UserError
from fedmoe_ds.export.command import export
from fedmoe_ds.federation.server import _sent
from fedmoe_ds.federation.traffic import Traffic
from fedmoe_ds.methods import ROUTER, Assignment, BlockSpec, ModelFacts, PlanContext, RoundContext, load_method
from fedmoe_ds.methods.split_mix import SHEFL, SplitMix
from fedmoe_ds.model.adapter_moe_layer import INNER
from fedmoe_ds.planner.flops import tier_flops
from fedmoe_ds.planner.workload import resolve
from fedmoe_ds.results import open_run

EXPERT = BlockSpec(INNER, (0, 1), (4, 3), expert=True)
ALONE: dict[str, Any] = {"adapters": {"moe": {"top_k": 1}}, "federation": {"rounds": 2}, "local": {"max_steps": 2}}
QUICK: dict[str, Any] = {"evaluation": {"max_sequences": 4, "client_sequences": 2, "every": 2}}


def method_of(name: str, **keys: Any) -> SplitMix:
    found = load_method(MethodConfig.model_validate({"name": name, **keys}))
    assert isinstance(found, SplitMix)
    found.facts = ModelFacts(1, EXPERTS, 4, 7, layers=(0, 1))
    return found


def clients(budgets: list[int]) -> list[Client]:
    return [Client(i, f"c{i}", 1, 5, 5, 50, experts=budget) for i, budget in enumerate(budgets)]


def bases(method: SplitMix, budgets: list[int], round_index: int) -> list[list[int]]:
    drawn = clients(budgets)
    parts = method.plan(PlanContext(round_index, drawn, drawn, {})).parts
    return [parts[i].tolist() for i in range(len(budgets))]


# Who trains what


@settings(max_examples=30, derandomize=True)
@given(st.lists(st.integers(1, EXPERTS), min_size=1, max_size=20), st.integers(1, 9))
def test_budgets_are_kept_and_the_list_is_the_plain_one(budgets: list[int], round_index: int) -> None:
    found = bases(method_of("split-mix"), budgets, round_index)
    assert [len(set(own)) for own in found] == budgets and every(0 <= base < EXPERTS for own in found for base in own)
    assert found == list(base_models(7, EXPERTS, round_index, dict(enumerate(budgets))).values())


def test_every_base_comes_once_in_a_cycle() -> None:
    """Clients with one base have that which is their turn: twelve of them in two rounds are three cycles of eight."""
    turns = [own[0] for index in (1, 2) for own in bases(method_of("split-mix"), [1] * 12, index)]
    cycles = [turns[first : first + EXPERTS] for first in range(0, len(turns), EXPERTS)]
    assert every(sorted(cycle) == list(range(EXPERTS)) for cycle in cycles) and len({*map(tuple, cycles)}) == 3
    assert Counter(turns) == dict.fromkeys(range(EXPERTS), 3)


def test_the_others_are_drawn_for_every_client_and_round() -> None:
    method, drawn = method_of("split-mix"), [4] * 8
    first, second = (bases(method, drawn, index) for index in (1, 2))
    assert len({tuple(own) for own in first}) > 4 and first != second and first == bases(method, drawn, 1)
    loads = Counter(itertools.chain.from_iterable(bases(method, drawn, 1)))
    plan = method.plan(PlanContext(1, clients(drawn), clients(drawn), {}))
    load_E = np.array([loads[base] for base in range(EXPERTS)])
    assert plan.load_variation == pytest.approx(load_E.std() / 4.0) and load_E.mean() == 4.0


def test_first_bases_are_nested() -> None:
    assert bases(method_of("split-mix", deal="first"), [3, 1, 8], 5) == [[0, 1, 2], [0], list(range(8))]


def test_a_client_has_one_model_per_base_and_a_tier_the_first_ones() -> None:
    method, (client,) = method_of("split-mix"), clients([3])
    told = method.assign(client, RoundContext(1, {}, plan=np.array([1, 4, 6])))
    scored = method.assign(client, RoundContext(0, {}))
    for assignment, wanted in ((told, [1, 4, 6]), (scored, [0, 1, 2])):
        assert assignment.members_MLE is not None and assignment.members_MLE.shape == (3, 2, EXPERTS)
        assert [np.flatnonzero(own_E).tolist() for own_LE in assignment.members_MLE for own_E in own_LE] == [
            [base] for base in wanted for _ in range(2)
        ]


# Weights


def update(client: Client, own: list[int]) -> ClientUpdate:
    counts_LE = np.ones((2, EXPERTS), dtype=np.int64)
    told = method_of("split-mix").assign(client, RoundContext(1, {}, plan=np.array(own)))
    return ClientUpdate(client, 0, 0, 1, 10, counts_LE, True, assignment=told)


def test_weights_are_of_those_who_train_a_base() -> None:
    (few, many), plain = clients([2, 8]), method_of("split-mix")
    weak, strong = update(few, [1, 5]), update(many, list(range(8)))
    assert plain.weights(EXPERT, weak, 0.3).tolist() == [[0, 0.3, 0, 0, 0, 0.3, 0, 0]] * 2
    assert plain.weights(EXPERT, strong, 0.3).tolist() == [[0.3] * 8] * 2
    for kappa in (2.0, -0.5):
        method = method_of("shefl", kappa=kappa)
        assert method.weights(EXPERT, weak, 0.3)[0, 1] == pytest.approx(0.3 * 0.25**kappa)
        assert (method.weights(EXPERT, strong, 0.3) == plain.weights(EXPERT, strong, 0.3)).all()
        # Normalised, they sum to one for every base; and where all have equally many, kappa changes nothing.
        total_LE = method.weights(EXPERT, weak, 0.3) + method.weights(EXPERT, strong, 0.7)
        shares_LE = method.weights(EXPERT, weak, 0.3) / total_LE + method.weights(EXPERT, strong, 0.7) / total_LE
        assert np.allclose(shares_LE, 1.0)
        twin = update(clients([2, 2])[1], [1, 3])
        one, other = method.weights(EXPERT, weak, 0.3)[0, 1], method.weights(EXPERT, twin, 0.7)[0, 1]
        assert one / (one + other) == pytest.approx(0.3)


def test_densities() -> None:
    drawn = clients([1, 2, 3, 8])
    for keys, wanted in (
        ({}, [1, 1, 1, 1]),
        ({"density": 0.4}, [Fraction(2, 5)] * 4),
        ({"upload": 1.0}, [1, Fraction(1, 2), Fraction(1, 3), Fraction(1, 8)]),
        ({"density": 0.4, "upload": 1.5}, [Fraction(2, 5), Fraction(2, 5), Fraction(2, 5), Fraction(3, 16)]),
    ):
        method = method_of("shefl", **keys)
        assert isinstance(method, SHEFL)
        assert [method.density(client) for client in drawn] == wanted
        told = [method.assign(client, RoundContext(0, {})).density for client in drawn]
        assert told == [None if share == 1 else share for share in wanted], "who sends all is told nothing"


# What is sent


def test_the_largest_changes_are_the_nearest() -> None:
    """By trying all vectors with as many entries: of six numbers, every subset."""
    draw = torch.Generator().manual_seed(3)
    received, value = (torch.randn(2, 3, 2, 3, generator=draw) for _ in range(2))
    for density, kept in ((0.5, 3), (0.34, 3), (Fraction(1, 3), 2), (0.01, 1)):
        assert kept_of(density, 6) == kept
        found = largest_changes(value, received, 2, density)
        change, sent = (value - received).double().flatten(-2), (found - received).double().flatten(-2)
        for place in itertools.product(range(2), range(3)):
            away = [
                float((change[place] - torch.where(torch.tensor([i in own for i in range(6)]), change[place], 0.0)).norm())
                for own in itertools.combinations(range(6), kept)
            ]
            assert int((sent[place] != 0).sum()) == kept
            assert float((change[place] - sent[place]).norm()) == pytest.approx(min(away), abs=1e-12)
        arrived = found != received
        assert torch.equal(found[arrived], value[arrived]), "its own numbers, unrounded"


def test_of_equal_changes_the_first_are_sent() -> None:
    received = torch.zeros(1, 5)
    value = torch.tensor([[1.0, -2.0, 2.0, 1.0, -2.0]])
    assert largest_changes(value, received, 1, 0.4).tolist() == [[0.0, -2.0, 2.0, 0.0, 0.0]]
    assert largest_changes(value, received, 1, 0.8).tolist() == [[1.0, -2.0, 2.0, 0.0, -2.0]]


def test_a_client_that_sends_all_sends_its_own_bits() -> None:
    draw = torch.Generator().manual_seed(4)
    received, value = (torch.randn(50, 7, generator=draw) for _ in range(2))
    assert torch.equal(largest_changes(value, received, 1, 1.0), value)


@pytest.mark.parametrize(("density", "numbers", "kept"), [(0.1, 10, 1), (0.7, 10, 7), (0.29, 100, 29), (1e-9, 10, 1)])
def test_shares_are_decimal_numbers(density: float, numbers: int, kept: int) -> None:
    assert kept_of(density, numbers) == kept


@pytest.mark.parametrize(("half", "item"), [("A", (4, 5)), ("B", (5, 4))])
def test_a_share_is_of_the_rows_that_a_client_holds(half: str, item: tuple[int, int]) -> None:
    """As many numbers arrive as its bytes say, which are those of its own rank."""
    spec, told = BlockSpec(f"x.lora_{half}", (0,), item), Assignment(1, rows_R=np.arange(4) < 2, density=0.5)
    mask, received = told.mask(spec, torch.device("cpu")), torch.zeros(1, *item)
    assert mask is not None
    value = mask * torch.rand(1, *item).add(1.0)
    view = SimpleNamespace(value=lambda _: value, received=lambda _: received, assignment=told)
    assert int((_sent(view, spec) != 0).sum()) == kept_of(0.5, 10) < kept_of(0.5, 20)  # type: ignore[arg-type]


# Runs


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("split-mix")
    write_dense(folder, ("llama",), (9, 7, 6))
    return folder


def config_of(root: Path, tag: str, name: str, budgets: tuple[int, ...], *changes: dict[str, Any], **keys: Any) -> Any:
    tiers = {"federation": {"tiers": [{"experts": budget, "share": 1.0} for budget in budgets]}}
    return dense_config(root, "llama", tag, {"method": {"name": name, **keys}}, ALONE, QUICK, tiers, *changes)


@pytest.fixture(scope="module")
def mixed(root: Path) -> Result:
    return run_alone(config_of(root, "mixed", "split-mix", (8, 3, 1)))


def test_shefl_without_its_parts_is_split_mix_to_the_bit(root: Path, mixed: Result) -> None:
    shefl = run_alone(config_of(root, "shefl", "shefl", (8, 3, 1), upload=8.0))
    assert shefl.digest == mixed.digest and shefl.scores() == mixed.scores()
    assert run_alone(config_of(root, "sparse", "shefl", (8, 3, 1), density=0.5)).digest != mixed.digest


def test_one_base_model_is_fedavg_with_one_adapter(root: Path) -> None:
    one = {"adapters": {"moe": {"experts": 1}}}
    ours = run_alone(config_of(root, "one", "split-mix", (1,), one))
    plain = run_alone(config_of(root, "adapter", "fft-moe", (), one, {"federation": {"tiers": None}}, auxiliary="none"))
    keys = [key for key in ours.adapters if ".experts." in key]
    assert len(keys) == 4 and every(np.allclose(ours.adapters[key], plain.adapters[key], rtol=0, atol=1e-6) for key in keys)
    assert every(ours.adapters[key].any() for key in keys)


def test_a_base_that_nobody_trains_keeps_its_bits(root: Path) -> None:
    """Three clients with one base each, weight decay, and a server with momentum."""
    config = config_of(root, "few", "split-mix", (1,), {"local": {"weight_decay": 0.5}, "server": {"optimizer": "fedavgm"}})
    parts, journal = build(config, *alone())
    journal.close()
    start = {key: value.numpy().copy() for key, _, value in parts.state.adapters.items(0)}
    result = run_alone(config)
    trained = {base for index in (1, 2) for own in base_models(0, EXPERTS, index, {0: 1, 1: 1, 2: 1}).values() for base in own}
    assert 3 <= len(trained) < EXPERTS
    for key, value in result.adapters.items():
        parts_of_key = key.split(".")
        moves = parts_of_key[2] == "experts" and int(parts_of_key[3]) in trained
        assert (value.tobytes() != start[key].tobytes()) == moves, key


def test_tiers_are_served_by_as_many_models(mixed: Result) -> None:
    """Their figures, clients' own among them, differ by tier once there is something to tell base models apart."""
    scored = [event for event in mixed.events if event["event"] == "eval" and event["round"] == 2]
    for split in ("global", "clients"):
        rows = {event["tier_label"]: event["loss"] for event in scored if event["split"] == split}
        assert list(rows) == ["1 e8", "1 e3", "1 e1"] and len({*rows.values()}) == 3
    own = [event for event in scored if event["split"] == "client"]
    assert len(own) == 9 and len({event["loss"] for event in own}) == 9, "every client at every budget"


def test_flops_count_every_model(mixed: Result) -> None:
    rows = [event for event in mixed.events if event["event"] == "client" and event["round"] == 1]
    spec, by_name = mixed.parts.spec, {client.name: client for client in mixed.parts.clients}
    for row in rows:
        client = by_name[row["client"]]
        rows_each = row["tokens"] / client.experts
        assert rows_each == int(rows_each) and row["experts_held"] == [client.experts] * 2
        one = spec.cost.spent(rows_each, 2 * rows_each, 2 * rows_each, 4)
        assert row["flops"] == pytest.approx(client.experts * one)
        assert spec.cost.client(client, spec.config.local) / row["flops"] == pytest.approx(1.0, abs=0.2)


def test_a_plan_counts_every_model(root: Path, mixed: Result) -> None:
    """As many rows, and FLOPs of a pass, as a run has."""
    job = resolve(config_of(root, "planned", "split-mix", (8, 3, 1)))
    rows = [event for event in mixed.events if event["event"] == "client" and event["round"] == 1]
    tokens = {row["client"]: row["tokens"] for row in rows}
    assert {client.name: int(job.steps(client, 1).rows.sum()) for client in job.clients} == tokens
    flops = {tier.label: tier.total for tier in tier_flops(job)}
    assert flops["1 e8"] == 8 * flops["1 e1"] and flops["1 e3"] == 3 * flops["1 e1"]


def test_bytes_are_those_of_the_numbers_that_are_sent(root: Path) -> None:
    parts, journal = build(config_of(root, "bytes", "shefl", (4, 2, 1), upload=1.0), *alone())
    journal.close()
    traffic = Traffic(parts.spec, parts.clients, 3)
    sizes = [math.prod(spec.item) * len(spec.layers) for spec in parts.spec.blocks if spec.expert]
    lengths = [math.prod(spec.item) for spec in parts.spec.blocks if spec.expert]
    assert {spec.name for spec in parts.spec.blocks if not spec.trained} == {ROUTER}
    for client in parts.clients:
        told = parts.spec.method.assign(client, RoundContext(1, {}, plan=np.arange(client.experts)))
        down, up = traffic.of(client.rank, told)
        assert down == 4 * client.experts * sum(sizes)
        # At half of the numbers their places cost as much as is saved.
        kept = [math.ceil(Fraction(length, client.experts)) for length in lengths]
        wanted = [2 * client.experts * min(8 * k, 4 * n) for k, n in zip(kept, lengths, strict=True)]
        assert up == sum(wanted) and (up < down) == (client.experts > 2)
        with_controls = Traffic(parts.spec, parts.clients, 3)
        with_controls._variates = 2
        assert with_controls.of(client.rank, told) == (2 * down, up + down), "control variates both ways, whole"


def test_a_finished_run_is_asked_as_the_ensemble(mixed: Result, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = rows_of(capsys, root / "runs" / "llama-mixed")
    assert [tuple(row.get(key) for key in FIELDS) for row in found] == of_round(mixed, 2) != []


def test_an_ensemble_is_not_exported_as_one_model(mixed: Result, root: Path, tmp_path: Path) -> None:
    run = open_run(root / "runs" / "llama-mixed")
    for tier, models in (("1 e3", "3 models"), ("1 e1", "1 model")):
        said = f"tier {tier} the mean of the logits of {models}, each with experts of its own, and .*; `fedmoe evaluate`"
        with pytest.raises(UserError, match=said):
            export("merged", request(run, run.select(tier), tmp_path / "out"))
