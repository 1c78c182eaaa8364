"""FedMoE's plans: pure functions of what the server remembers. Sub-models and phases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from every import every
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_ds.clients.assignment import Assignment
from fedmoe_ds.clients.client import Client
from fedmoe_ds.clients.update import ClientUpdate
from fedmoe_ds.config import MethodConfig
from fedmoe_ds.methods import (
    BlockSpec,
    Memory,
    Method,
    ModelFacts,
    PlanContext,
    RoundContext,
    load_method,
)
from fedmoe_ds.methods.fed_moe import CHANGED, FROZEN, PROFILE, SEARCHED, FedMoE, Profiles, SubModel

L, E = 2, 6
SHAPE = (L, E)
EXPERTS = BlockSpec("experts.down.lora_A", (0, 1), (4, 3), expert=True)
ATTENTION = BlockSpec("attention.q_proj.lora_A", (0, 1), (4, 3))


def make(name: str, experts: int = E, **keys: Any) -> Method:
    method = load_method(MethodConfig.model_validate({"name": name, **keys}))
    method.facts = ModelFacts(2, experts, 4, 7, layers=(0, 1))
    return method


def fed_moe(**keys: Any) -> FedMoE:
    method = make("fed-moe", **{"profile_rounds": 1, **keys})
    assert isinstance(method, FedMoE)
    return method


def client(index: int, experts: int = 3, cap: int = 2) -> Client:
    return Client(index, f"c{index}", cap, 5, 5, 50, cap, 4, experts)


def asked(clients: list[Client], memories: dict[int, Memory], round_index: int = 2) -> PlanContext:
    return PlanContext(round_index, clients, clients, memories)


def report(
    one: Client, plan: Any, observed: dict[str, np.ndarray], memory: Memory | None, losses: tuple[float, float] = (1.0, 1.0)
) -> ClientUpdate:
    counts_LE = np.ones(SHAPE, dtype=np.int64)
    return ClientUpdate(one, 0, 0, 1, 10, counts_LE, True, losses, observed=observed, plan=plan, memory=memory or {})


def scores(seed: int) -> np.ndarray:
    drawn = np.random.default_rng(seed).random(SHAPE) ** 2
    return drawn / drawn.sum(1, keepdims=True)


def next_model(method: FedMoE, one: Client, memories: dict[int, Memory]) -> SubModel:
    return method.next_model(one, memories, Profiles(memories))


def changed(method: FedMoE, one: Client, memories: dict[int, Memory]) -> np.ndarray:
    return method.changed(one, memories, Profiles(memories))


def remembered(score_LE: np.ndarray, held_LE: np.ndarray, phase: int, stale: float = 0.0) -> Memory:
    held = held_LE.astype(float)
    return {"scores": score_LE, "held": held, "before": held, "progress": np.array([3.0, phase, 1.0, stale])}


# FedMoE


@settings(max_examples=50, derandomize=True)
@given(
    st.integers(0, 10**6),
    st.integers(1, 6),
    st.integers(1, 6),
    st.floats(0.1, 1.0),
    st.sampled_from(["max-min", "uniform", "random"]),
)
def test_a_sub_model_has_its_slots(seed: int, experts: int, cap: int, share: float, search: str) -> None:
    method, one = fed_moe(memory_share=share, search=search), client(0, experts, cap)
    held_LE = method.search(one, scores(seed))
    least = min(cap, experts)
    assert held_LE.sum() == max(L * least, int(share * L * experts + 1e-9)) <= L * experts
    assert held_LE.sum(1).min() >= min(least, held_LE.sum() // L)


def test_the_layer_whose_scores_are_flat_gets_more_experts_unless_all_get_the_same() -> None:
    score_LE = np.array([[1 / E] * E, [0.9] + [0.02] * 5])
    counts = {
        search: fed_moe(search=search, memory_share=1.0).search(client(0, 3, 1), score_LE).sum(1).tolist()
        for search in ("max-min", "uniform")
    }
    assert counts == {"max-min": [5, 1], "uniform": [3, 3]}


def test_a_budget_for_all_experts_is_all_experts() -> None:
    method, one = fed_moe(memory_share=1.0), client(0, E)
    part = next_model(method, one, {0: remembered(scores(1), np.ones(SHAPE), PROFILE)})
    assert part.phase == SEARCHED and part.held_LE.all()
    context = RoundContext(2, {}, plan=part)
    assert method.assign(one, context) == Assignment(one.cap)


def test_profiling_comes_first() -> None:
    method, one = fed_moe(profile_rounds=4), client(0)
    assert next_model(method, one, {}).phase == PROFILE
    memory = remembered(scores(1), np.ones(SHAPE), PROFILE)
    assert memory["progress"][0] == 3 and next_model(method, one, {0: memory}).phase == PROFILE
    memory["progress"][0] = 4
    part = next_model(method, one, {0: memory})
    assert part.phase == SEARCHED and not part.held_LE.all()


def test_the_twins_experts_are_wanted() -> None:
    """K = 1 and one twin: phat is the twin's p, so what is added are its best experts outside the own sub-model."""
    method, small, large = fed_moe(similar=1), client(0, 4), client(1, 5)
    score_LE, held_LE = scores(3), np.zeros(SHAPE, dtype=bool)
    held_LE[:, :2] = True
    twin_LE = held_LE.copy()
    twin_LE[0, 2:5] = True
    stranger = remembered(scores(4), np.ones(SHAPE), SEARCHED)
    memories = {
        0: remembered(score_LE, held_LE, SEARCHED, 2.0),
        1: remembered(2 * score_LE, twin_LE, SEARCHED),
        2: stranger,
        3: remembered(score_LE, np.ones(SHAPE), PROFILE),
    }
    more_LE = changed(method, small, memories) & ~held_LE
    outside = sorted((-score_LE[l, e], l, e) for l in range(L) for e in range(E) if not held_LE[l, e])[:3]  # noqa: E741
    assert {(l, e) for l, e in np.argwhere(more_LE)} == {(l, e) for _, l, e in outside}  # noqa: E741
    # And the other way round: the larger one drops its three worst, by the same p.
    memories[1]["progress"][3] = 2.0
    dropped_LE = twin_LE & ~changed(method, large, memories)
    assert dropped_LE.sum() == 3 and dropped_LE[1].sum() == 0
    assert score_LE[dropped_LE].max() < score_LE[0][twin_LE[0] & ~dropped_LE[0]].min()


def test_never_more_than_the_budget_nor_less_than_a_token_activates() -> None:
    method, one = fed_moe(similar=2), client(0, 3, cap=2)
    held_LE = method.search(one, scores(5))
    others = {i: remembered(scores(i), np.ones(SHAPE), SEARCHED) for i in (1, 2)}
    most_LE = changed(method, one, {0: remembered(scores(5), held_LE, SEARCHED), **others})
    assert most_LE.sum() == L * 3 > held_LE.sum()
    poor_LE = np.zeros(SHAPE)
    others = {i: remembered(scores(i), poor_LE, SEARCHED) for i in (1, 2)}
    assert (changed(method, one, {0: remembered(scores(5), held_LE, SEARCHED), **others}).sum(1) == 2).all()


def test_the_most_similar_ones_are_found_by_their_cosines() -> None:
    """Those that still profile are similar to nobody, and of twins the lower index comes first."""
    memories = {i: remembered(scores(i % 7), np.ones(SHAPE), PROFILE if i == 4 else SEARCHED) for i in range(20)}
    found = Profiles(memories).nearest(3, 6)
    flat = {i: one["scores"].ravel() for i, one in memories.items() if i not in (3, 4)}
    own = memories[3]["scores"].ravel()
    cosines = {i: float(p @ own / np.linalg.norm(p) / np.linalg.norm(own)) for i, p in flat.items()}
    assert list(found)[:2] == [10, 17]
    assert list(found) == sorted(cosines, key=lambda i: (-round(cosines[i], 6), i))[:6]
    assert list(found.values()) == [pytest.approx(cosines[i], abs=1e-6) for i in found]


@settings(max_examples=20, derandomize=True)
@given(st.permutations(range(5)), st.integers(0, 10**6))
def test_names_of_clients_change_nothing(names: list[int], seed: int) -> None:
    method, clients = fed_moe(similar=2), [client(i, 3 + i % 3) for i in range(5)]
    memories = {
        i: remembered(scores(seed + i), method.search(one, scores(seed + i)), SEARCHED, 2.0) for i, one in enumerate(clients)
    }
    plain = method.plan(asked(clients, memories)).parts
    renamed = [client(names[i], 3 + i % 3) for i in range(5)]
    moved = method.plan(asked(renamed, {names[i]: memories[i] for i in reversed(range(5))})).parts
    assert every((plain[i].held_LE == moved[names[i]].held_LE).all() for i in range(5))


def follow(method: FedMoE, one: Client, losses: list[float], others: dict[int, Memory]) -> list[tuple[int, int]]:
    """(phase, experts held) of every round of a client whose losses are these."""
    memory: Memory = {}
    seen = []
    for loss in losses:
        part = next_model(method, one, {one.index: memory, **others} if memory else others)
        seen.append((part.phase, int(part.held_LE.sum())))
        memory = method.memorise(report(one, part, {"scores": 10 * scores(1)}, memory, (loss + 0.1, loss - 0.1)))
        assert {name: value.shape for name, value in memory.items()} == method.memory()
    return seen


def test_a_change_that_does_not_help_is_reverted_for_good() -> None:
    method, one = fed_moe(memory_share=0.5, patience=2), client(0, 6, cap=2)
    others = {i: remembered(scores(1), np.ones(SHAPE), SEARCHED) for i in (1, 2, 3)}
    # All experts reach 1.0; the sub-model falls to 1.9, stalls for two rounds, and so does what is changed.
    seen = follow(method, one, [1.0, 2.0, 1.9, 1.895, 1.9, 1.9, 1.9, 1.0, 1.0, 1.0], others)
    sub, changed = (SEARCHED, 6), (CHANGED, 12)
    assert seen == [(PROFILE, 12), sub, sub, sub, sub, changed, changed, (FROZEN, 6), (FROZEN, 6), (FROZEN, 6)]


def test_a_change_that_helps_stays_and_may_be_followed_by_another() -> None:
    method, one = fed_moe(memory_share=0.5, patience=1), client(0, 6, cap=2)
    others = {i: remembered(scores(1), np.ones(SHAPE), SEARCHED) for i in (1, 2, 3)}
    seen = follow(method, one, [1.0, 2.0, 2.0, 1.5, 1.5, 1.5, 1.5], others)
    assert seen == [(PROFILE, 12), (SEARCHED, 6), (SEARCHED, 6), (CHANGED, 12), (SEARCHED, 12), (CHANGED, 12), (FROZEN, 12)]
    assert follow(fed_moe(memory_share=0.5, refine=False), one, [1.0] * 9, others)[-1] == (SEARCHED, 6)


def test_holders_weigh_their_data() -> None:
    method = fed_moe()
    held_LE = np.arange(L * E).reshape(SHAPE) % 2 == 0
    update = report(client(0), SubModel(held_LE, held_LE, SEARCHED), {}, None)
    assert (method.weights(EXPERTS, update, 0.25) == 0.25 * held_LE).all()
    assert (method.weights(ATTENTION, update, 0.25) == [0.25, 0.25]).all()
