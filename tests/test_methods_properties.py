"""What each method promises, observed in real runs of the small federation: who trains, moves, keeps and shares what."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from every import every
from federations import Result, alone, build, finish, make_config, own_values, run_alone, write_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmoe_ds.checkpoint.digest import global_digest
from fedmoe_ds.clients.assignment import Assignment, leading
from fedmoe_ds.clients.client import Client
from fedmoe_ds.clients.client_view import ClientView
from fedmoe_ds.clients.update import ClientUpdate
from fedmoe_ds.config import Config, MethodConfig
from fedmoe_ds.data import Sequences
from fedmoe_ds.federation.build import Parts
from fedmoe_ds.federation.server import BASE
from fedmoe_ds.methods import ModelFacts, load_method
from fedmoe_ds.methods.hetlora import RANK, HetLoRA
from fedmoe_ds.methods.hfedmoe import HFedMoE
from fedmoe_ds.model.adapter_bank import BlockSpec, lora_pairs
from fedmoe_ds.model.pass_context import RoutingObserver
from fedmoe_ds.model.router import Routing

QUICK: dict[str, Any] = {"evaluation": {"client_sequences": 0, "every": 9}, "execution": {"micro_batch_size": None}}
TRAINED_ROUTER: dict[str, Any] = {"adapters": {"router": "train"}}
EXPERT = BlockSpec("experts.down.lora_A", (0, 1), (4, 8), expert=True)
ROUTER = BlockSpec("router.weight", (0, 1), (5, 8))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("properties")
    write_inputs(folder)
    return folder


def config_of(root: Path, tag: str, method: dict[str, Any], *changes: dict[str, Any]) -> Config:
    return make_config(root, tag, QUICK, {"method": method}, *changes)


def values(parts: Parts) -> dict[str, Tensor]:
    return {key: value.clone() for key, _, value in parts.state.adapters.items(0)}


def spy(parts: Parts, **hooks: Any) -> None:
    """Put a hook behind the method's own (`adjust`: every step, `remember`: every finished client)."""
    rules = parts.trainer.hooks
    parts.trainer.hooks = replace(rules, **{name: (*getattr(rules, name), hook) for name, hook in hooks.items()})


# Averages


@pytest.mark.parametrize("tiers", [None, [{"top_k": 4, "share": 1.0}]], ids=["unequal k", "equal k"])
def test_flame_without_its_parts_is_fedit(root: Path, tiers: Any) -> None:
    """t = 0 and no rescaler: the same bits."""
    change = {"federation": {"tiers": tiers}}
    tag = "all" if tiers is None else "one"
    fedit = run_alone(config_of(root, f"fedit-{tag}", {"name": "fedit"}, change))
    flame = {"name": "flame", "temperature": 0.0, "rescaler": "none"}
    assert run_alone(config_of(root, f"flame-{tag}", flame, change)).digest == fedit.digest
    assert run_alone(config_of(root, f"flame-{tag}-2", {**flame, "temperature": 2.0}, change)).digest != fedit.digest


FORBIDDEN = 3
KEEPS_BITS: dict[str, dict[str, Any]] = {
    "fedit": {},
    "flame": {},
    "hfedmoe": TRAINED_ROUTER,
    "hetlora": {},
    "fslora": {},
    "lora-fair": {},
    "fedrot-lora": {},
    "ffa-lora": {},
    "fedprox": {"method": {"name": "fedit"}, "local": {"drift": "fedprox"}},
    "fedadam": {"method": {"name": "flame"}, "server": {"optimizer": "fedadam", "lr": 0.01}},
}


def run_without_one_expert(root: Path, name: str, changes: dict[str, Any]) -> tuple[Parts, dict[str, Tensor], Result]:
    """A run in which no client may route a token to one expert."""
    parts, journal = build(config_of(root, f"unused-{name}", {"name": name}, changes), *alone())
    start, rules = values(parts), parts.trainer.hooks
    allowed_LE = np.ones(parts.counts_shape, dtype=bool)
    allowed_LE[:, FORBIDDEN] = False

    def assign(client: Client, round_index: int) -> Assignment:
        return replace(rules.assign(client, round_index), allowed_LE=allowed_LE)

    parts.trainer.hooks = replace(rules, assign=assign)
    return parts, start, finish(parts, journal)


@pytest.mark.parametrize("name", KEEPS_BITS)
def test_an_unused_expert_keeps_its_bits(root: Path, name: str) -> None:
    _, start, result = run_without_one_expert(root, name, KEEPS_BITS[name])
    unused = [key for key in start if f".experts.{FORBIDDEN}." in key]
    assert len(unused) == 8 and every(np.array_equal(result.adapters[key], start[key].numpy()) for key in unused)
    moved = [key for key in start if not np.array_equal(result.adapters[key], start[key].numpy())]
    assert any(".experts.4." in key for key in moved), "the others moved"


@pytest.mark.parametrize("name", ["flexlora", "flora", "florist"])
def test_an_unused_expert_computes_the_same(root: Path, name: str) -> None:
    """Re-factored or drawn afresh, the adapter of an unused expert still adds nothing, and nothing was merged for it."""
    parts, start, result = run_without_one_expert(root, name, {})
    for key in start:
        if f".experts.{FORBIDDEN}." in key and key.endswith("lora_B"):
            assert not result.adapters[key].any() and not bool(start[key].any())
    if name != "flexlora":
        fresh, journal = build(config_of(root, "unused-start", {"name": name}), *alone())
        journal.close()
        pairs = zip(parts.state.server[BASE].items(0), fresh.state.server[BASE].items(0), strict=True)
        same = {key: torch.equal(ours, theirs) for (key, _, ours), (_, _, theirs) in pairs}
        assert every(equal == (f".experts.{FORBIDDEN}." in key) for key, equal in same.items()), same


# HFedMoE


def make_routing(seed: int, tokens: int, experts: int, top_k: int) -> Routing:
    draw = torch.Generator().manual_seed(seed)
    probs_TE = torch.softmax(torch.randn(tokens, experts, generator=draw) * 2, -1)
    weights_TK, experts_TK = probs_TE.topk(top_k)
    return Routing(probs_TE, weights_TK, experts_TK, torch.rand(tokens, top_k, generator=draw) < 0.7)


def hfedmoe(**keys: Any) -> HFedMoE:
    method = load_method(MethodConfig.model_validate({"name": "hfedmoe", **keys}))
    assert isinstance(method, HFedMoE)
    return method


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 30),
    st.integers(1, 8),
    st.integers(1, 12),
    st.sampled_from(["information", "importance"]),
)
def test_hfedmoe_selects_within_budget_and_union(seed: int, tokens: int, top_k: int, budget: int, rank_by: str) -> None:
    routing = make_routing(seed, tokens, 8, top_k)
    active_E, sums = hfedmoe(rank_by=rank_by).select(budget, routing, torch.ones(tokens, dtype=torch.bool))
    union = set(routing.experts_TK[routing.kept_TK].tolist())
    chosen = set(active_E.nonzero().flatten().tolist())
    assert chosen <= union and len(chosen) == min(budget, len(union))
    assert set(sums) == {"usage", "importance"} and float(sums["usage"].sum()) == pytest.approx(tokens)
    if rank_by == "importance" and chosen and union - chosen:
        least = min(float(sums["importance"][e]) for e in chosen)
        assert least >= max(float(sums["importance"][e]) for e in union - chosen)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.0, 1.0), st.sampled_from(["usage", "trained"]))
def test_hfedmoe_weighs_what_is_used_enough(seed: int, tau: float, participation: str) -> None:
    draw = np.random.default_rng(seed)
    method, steps, tokens = hfedmoe(tau=tau, participation=participation), 4, 50
    usage_LE, importance_LE = draw.random((2, 5)) * tokens, draw.random((2, 5)) * steps
    client = Client(0, "one", 8, 30, 30, 600)
    update = ClientUpdate(client, 0, 0, steps, tokens, np.ones((2, 5)), finite=True)
    update.observed = {"usage": usage_LE, "importance": importance_LE}
    update.trained_LE = draw.integers(0, 2, size=(2, 5))
    counted = usage_LE / tokens >= tau
    averaged = counted if participation == "usage" else counted & (update.trained_LE > 0)
    assert np.array_equal(method.weights(EXPERT, update, 0.4), np.where(averaged, 0.4, 0.0))
    alpha = [
        sum(u / tokens * s / steps for u, s, c in zip(*rows, strict=True) if c)
        for rows in zip(usage_LE, importance_LE, counted, strict=True)
    ]
    assert np.allclose(method.weights(ROUTER, update, 0.4), alpha, rtol=1e-12)


@pytest.mark.parametrize("training", ["lora", "full"])
def test_experts_that_were_not_selected_get_exactly_no_gradient(root: Path, training: str) -> None:
    change = {"adapters": {"router": "train", "expert_training": training}, "federation": {"rounds": 1}}
    parts, journal = build(config_of(root, f"selected-{training}", {"name": "hfedmoe"}, change), *alone())
    rules, masks, seen = parts.trainer.hooks, dict[int, list[Tensor]](), dict.fromkeys(("selected", "reached", "held back"), 0)

    def observer(client: Client, assignment: Assignment) -> RoutingObserver:
        own = rules.observer(client, assignment)
        assert own is not None and own.observe is not None
        observe = own.observe

        def recorded(routing: Routing, valid_T: Tensor) -> tuple[Tensor | None, dict[str, Tensor]]:
            active_E, sums = observe(routing, valid_T)
            assert active_E is not None and int(active_E.sum()) <= client.experts
            masks.setdefault(client.index, []).append(active_E)
            return active_E, sums

        return RoutingObserver(observe=recorded)

    def adjust(local: ClientView) -> None:
        active_LE = torch.stack(masks[local.client.index][-2:])  # layers run in order, and one pass makes a step
        for spec in local.blocks():
            if spec.expert:
                has_LE = local.grad(spec).flatten(2).any(-1)
                assert not bool((has_LE & ~active_LE).any()), spec.name
                if spec.rank_axis != 0:  # A has no gradient in the first step, while B is zero
                    seen["selected"] += int(active_LE.sum())
                    seen["reached"] += int(has_LE.sum())
                seen["held back"] += int((~active_LE).sum())

    parts.trainer.hooks = replace(rules, observer=observer)
    spy(parts, adjust=adjust)
    finish(parts, journal)
    assert seen["held back"] > 100
    assert seen["reached"] > 0.95 * seen["selected"], "but for experts of tokens that no loss depends on"
    assert {client.experts for client in parts.clients} == {16, 8, 4, 2}


# HetLoRA, FlexLoRA, FLoRA, FSLoRA: rows


def test_hetloras_pull_is_the_gradient_of_its_penalty(root: Path) -> None:
    method = {"name": "hetlora", "gamma": 0.5, "penalty": 0.7}
    parts, journal = build(config_of(root, "penalty", method), *alone())
    rules, before, pulled = parts.trainer.hooks, dict[str, Tensor](), [0.0]

    def ahead(local: ClientView) -> None:
        before.update({spec.name: local.grad(spec).clone() for spec in local.blocks()})

    def behind(local: ClientView) -> None:
        rank = local.assignment.rank(4)
        tail = slice(math.floor(0.5 * rank), rank)
        for pair in local.pairs():
            leaves = [local.value(half).double().requires_grad_() for half in pair]
            norm_a, norm_b = leaves[0][..., tail, :].flatten(-2).norm(dim=-1), leaves[1][..., tail].flatten(-2).norm(dim=-1)
            there = (norm_a > 0) & (norm_b > 0)  # where a norm is zero it has no gradient, and the method adds none
            penalty = 0.7 * (norm_a * norm_b)[there].sum()
            slopes = torch.autograd.grad(penalty, leaves)
            for half, slope in zip(pair, slopes, strict=True):
                added = local.grad(half).double() - before[half.name].double()
                assert torch.allclose(added, torch.nan_to_num(slope), rtol=1e-5, atol=1e-6), half.name
                pulled[0] = max(pulled[0], float(added.abs().max()))

    parts.trainer.hooks = replace(rules, adjust=(ahead, *rules.adjust, behind))
    finish(parts, journal)
    assert pulled[0] > 1e-3


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 16), st.floats(0.05, 0.99), st.integers(1, 16), st.floats(0, 2), st.floats(0, 2), st.booleans())
def test_hetlora_prunes_when_the_tail_shrank(
    rank: int, gamma: float, least: int, before: float, after: float, pruning: bool
) -> None:
    keys = {"name": "hetlora", "gamma": gamma, "min_rank": least, "pruning": pruning}
    method = load_method(MethodConfig.model_validate(keys))
    assert isinstance(method, HetLoRA)
    method.facts = ModelFacts(8, 16, 16, 0)
    update = ClientUpdate(Client(0, "one", 8, 1, 1, 1), 0, 0, 1, 1, np.ones((2, 5)), finite=True)
    update.assignment = Assignment(8, leading(rank, 16))
    half = {"x.before": np.full(2, before / 4), "x.after": np.full(2, after / 4)}
    update.measured = {
        **half,
        "y.before": np.full((1, 2), before / 4),
        "y.after": np.full((1, 2), after / 4),
        "x.norm": np.ones(2),
    }
    found = int(method.remember(update)[RANK.name].item())
    if pruning and after / 4 < before / 4:
        assert found == max(min(least, rank), math.floor(gamma * rank)) and 1 <= found <= rank
    else:
        assert found == rank


def test_ranks_fall_in_a_real_run_and_are_used(root: Path) -> None:
    method = {"name": "hetlora", "gamma": 0.5, "penalty": 20.0}
    result = run_alone(config_of(root, "pruned", method, {"federation": {"rounds": 4}}))
    ranks: dict[str, list[int]] = {}
    for event in result.events:
        if event["event"] == "client":
            ranks.setdefault(event["client"], []).append(event["rank"] or 4)
    assert every(later <= sooner for own in ranks.values() for sooner, later in pairwise(own))
    assert any(own[-1] < own[0] for own in ranks.values()), ranks
    kept = own_values(result.parts)[RANK.name].flatten().tolist()
    assert every(kept[client.index] <= ranks[client.name][-1] for client in result.parts.clients)


@pytest.mark.parametrize("name", ["hetlora", "flexlora", "flora", "fslora"])
def test_rows_that_a_client_does_not_hold_stay_zero(root: Path, name: str) -> None:
    parts, journal = build(config_of(root, f"rows-{name}", {"name": name}), *alone())
    checked = {"adjust": 0, "remember": 0}

    def absent(local: ClientView, values_of: Any) -> int:
        found = 0
        for spec in local.blocks():
            mask = local.assignment.mask(spec, torch.device("cpu"))
            if mask is not None:
                assert int(mask.sum()) == local.client.rank and mask.numel() == 4
                assert not bool((values_of(spec) * ~mask).any()), spec.name
                found += 1
        return found

    def adjust(local: ClientView) -> None:
        checked["adjust"] += absent(local, local.grad) * absent(local, local.value)

    def remember(local: ClientView, rates: float) -> dict[str, Tensor]:
        checked["remember"] += absent(local, local.value)
        return {}

    spy(parts, adjust=adjust, remember=remember)
    finish(parts, journal)
    assert every(checked.values())


def test_fsloras_other_rows_keep_their_global_bits(root: Path) -> None:
    """One participant a round: what it does not hold is the global value, bit by bit, and what it holds moves."""
    change = {"federation": {"participation": 0.1, "tiers": [{"top_k": 4, "share": 1.0}], "rounds": 1}}
    parts, journal = build(config_of(root, "sketch", {"name": "fslora"}, change), *alone())
    start = values(parts)
    (client,) = parts.participants(1)
    rows_R = parts.trainer.hooks.assign(client, 1).rows_R
    assert rows_R is not None and rows_R.sum() == 2
    result = finish(parts, journal)
    moved = 0
    for key, value in start.items():
        rows = result.adapters[key] != value.numpy() if key.endswith("_A") else (result.adapters[key] != value.numpy()).T
        assert not rows[~rows_R].any(), key
        moved += int(rows[rows_R].any(1).sum())
    assert moved


def test_fslora_draws_for_every_client_and_round(root: Path) -> None:
    method = load_method(MethodConfig.model_validate({"name": "fslora"}))
    method.facts = ModelFacts(8, 16, rank=8, seed=0)
    parts, journal = build(config_of(root, "draws", {"name": "fslora"}, {"adapters": {"rank": 8}}), *alone())
    journal.close()
    drawn = {}
    for client in (client for client in parts.clients if client.rank == 4):
        for round_index in range(1, 200):
            assignment = parts.trainer.hooks.assign(client, round_index)
            assert assignment.rows_R is not None and assignment.rows_R.sum() == 4 and assignment.scale == 2.0
            drawn[client.index, round_index] = tuple(assignment.rows_R)
        assert parts.trainer.hooks.assign(client, 0).rows_R is None, "evaluation: S = I"
    assert len(set(drawn.values())) > 50, "there are 70 subsets of four of eight rows"
    assert np.mean(list(drawn.values()), axis=0) == pytest.approx(0.5, abs=0.15), "E S = I"


# Halves and wholes that stay


def test_ffas_a_never_moves(root: Path) -> None:
    parts, journal = build(config_of(root, "ffa", {"name": "ffa-lora"}), *alone())
    start, result = values(parts), finish(parts, journal)
    halves = {"A": [key for key in start if key.endswith("_A")], "B": [key for key in start if key.endswith("_B")]}
    assert halves["A"] and every(np.array_equal(result.adapters[key], start[key].numpy()) for key in halves["A"])
    assert any(not np.array_equal(result.adapters[key], start[key].numpy()) for key in halves["B"])


def test_fedsa_shares_a_and_keeps_b(root: Path) -> None:
    parts, journal = build(config_of(root, "fedsa", {"name": "fedsa-lora"}), *alone())
    start, result = values(parts), finish(parts, journal)
    assert start and every(key.endswith("lora_A") for key in start), "nothing but A is global"
    assert every(not np.array_equal(result.adapters[k], start[k].numpy()) for k in start if "attention" in k)
    personal = own_values(parts)
    assert set(personal) == {b.name for _, b in lora_pairs(parts.spec.blocks)}
    for name, value in personal.items():
        rows = {value[client.index].numpy().tobytes() for client in parts.clients}
        assert len(rows) == len(parts.clients), f"{name}: every client has its own"
    ends = dict[int, Tensor]()

    def remember(local: ClientView, rates: float) -> dict[str, Tensor]:
        ends[local.client.index] = local.value(parts.execution.bank.specs["attention.q_proj.lora_B"]).clone()
        return {}

    again, journal = build(config_of(root, "fedsa-again", {"name": "fedsa-lora"}), *alone())
    spy(again, remember=remember)
    assert finish(again, journal).digest == result.digest
    assert every(torch.equal(personal["attention.q_proj.lora_B"][index], value) for index, value in ends.items())


class OtherData:
    """The run's data, but one client has other tokens."""

    def __init__(self, parts: Parts, victim: int) -> None:
        self.data, self.victim = parts.training_data, victim

    def train(self, client: int) -> Sequences:
        data = self.data.train(client)
        if client != self.victim:
            return data
        return replace(data, input_ids=[np.full_like(ids, 7) for ids in data.input_ids])


def personal_after(root: Path, tag: str, name: str, victim: int | None) -> dict[str, Tensor]:
    parts, journal = build(config_of(root, tag, {"name": name}), *alone())
    if victim is not None:
        parts.training_data = OtherData(parts, victim)
    finish(parts, journal)
    return own_values(parts)


def test_alone_nobody_learns_from_anybody(root: Path) -> None:
    """Two rounds: a client's model depends on nobody else's data. With FedSA-LoRA, which shares A, it does."""
    for name, depends in (("local-only", False), ("fedsa-lora", True)):
        before = personal_after(root, f"alone-{name}", name, None)
        after = personal_after(root, f"alone-{name}-other", name, 2)
        for block, value in before.items():
            same = [torch.equal(value[index], after[block][index]) for index in range(6)]
            assert not same[2], block
            assert every(same[:2] + same[3:]) != depends, block


def test_local_onlys_global_adapters_never_move(root: Path) -> None:
    parts, journal = build(config_of(root, "local", {"name": "local-only"}), *alone())
    assert not values(parts), "there are none"
    assert finish(parts, journal).digest != start_digest(root)


def start_digest(root: Path) -> str:
    """What the digest is before anything was learnt: personal models count."""
    parts, journal = build(config_of(root, "local-start", {"name": "local-only"}), *alone())
    journal.close()
    return global_digest(parts.result_tensors(), parts.runtime, 1, parts.own_hashes())


@pytest.mark.parametrize("federation", [{}, {"participation": 0.5}, {"participation": 0.34, "sampling": "size"}], ids=str)
def test_centralised_trains_on_the_tokens_of_the_rounds_participants(root: Path, federation: dict[str, Any]) -> None:
    change = {"federation": {"rounds": 2, **federation}}
    tag = str(len(str(federation)))
    parts, journal = build(config_of(root, f"pooled{tag}", {"name": "centralised"}, change), *alone())
    everything = sum(len(parts.data.train(client.index)) for client in parts.clients)
    assert parts.participants(1)[0].sequences == len(parts.training_data.train(0)) == everything
    pooled = finish(parts, journal)
    each = run_alone(config_of(root, f"each{tag}", {"name": "fedit"}, change))
    tokens = [[event["tokens"] for event in run.events if event["event"] == "round"] for run in (pooled, each)]
    assert tokens[0] == tokens[1] and len(tokens[1]) == 2
    steps = [event["steps"] for event in pooled.events if event["event"] == "client"]
    assert steps == [len(rows) for rows in ([0] * pooled.parts.participants(r)[0].steps for r in (1, 2))]


@pytest.mark.parametrize("share", [0.32, 1.0, 64.0])
def test_a_round_that_averages_nothing_says_so(root: Path, share: float, capsys: pytest.CaptureFixture[str]) -> None:
    change = {**TRAINED_ROUTER, "federation": {"rounds": 1}}
    result = run_alone(config_of(root, f"share-{share}", {"name": "hfedmoe", "tau_share": share}, change))
    told = [event for event in result.events if event["event"] == "not_averaged"]
    expected = [spec.name for spec in result.parts.spec.blocks if spec.expert or spec.name == "router.weight"]
    assert [event["blocks"] for event in told] == ([expected] if share > 16 else [])
    assert ("round 1: nothing of what clients trained was averaged in experts." in capsys.readouterr().err) == (share > 16)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([8, 16, 128, 256]))
def test_hfedmoes_threshold_means_the_same_with_any_number_of_experts(seed: int, experts: int) -> None:
    """Scores of the same spread: about as large a share of the experts is averaged, whatever their number."""
    method = hfedmoe()
    method.facts = ModelFacts(top_k=4, num_experts=experts, rank=4, seed=0)
    scores_TE = np.exp(np.random.default_rng(seed).normal(size=(64, experts)))
    usage_LE = (scores_TE / scores_TE.sum(1, keepdims=True)).sum(0)[None]
    counts_LE = np.ones((1, experts), dtype=np.int64)
    client = Client(0, "one", 4, 1, 1, 64)
    update = ClientUpdate(
        client, 0, 0, 1, 64, counts_LE, finite=True, trained_LE=counts_LE, observed={"usage": usage_LE, "importance": usage_LE}
    )
    spec = BlockSpec("experts.down.lora_A", (0,), (4, 8), expert=True)
    assert (method.weights(spec, update, 1.0) > 0).all(), "0.32 of the mean: all of these experts are used enough"
    absolute = hfedmoe(tau=0.02)
    absolute.facts = method.facts
    assert (absolute.weights(spec, update, 1.0) > 0).any() == (experts <= 16), "the paper's absolute value"
