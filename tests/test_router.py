"""Routing: caps, masks, padding, expert groups, renormalisation, ties. Legend: T rows, E experts, K top-k."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmoe_ds.model.router import Demand, Modulation, Routing, kept_slots, route

EXPERTS, TOP_K = 8, 4


@dataclass
class Spec:
    """A routing rule, as DeepSpeed's router states it."""

    num_experts: int = EXPERTS
    num_expert_groups: int | None = None
    num_limited_groups: int | None = None
    top_k: int = TOP_K
    score_func: str = "softmax"
    route_norm: bool = False
    route_scale: float = 1.0
    group_score_func: str = "top2_sum"
    e_score_correction_bias: Tensor | None = field(default=None)


def logits(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, EXPERTS, generator=torch.Generator().manual_seed(seed))


def caps(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def everyone(rows: int) -> Tensor:
    return torch.ones(rows, dtype=torch.bool)


def used(routing: Routing, row: int) -> list[int]:
    return routing.experts_TK[row][routing.kept_TK[row]].tolist()


def test_each_row_has_its_own_cap() -> None:
    logits_TE = logits(4)
    routing = route(logits_TE, Spec(), caps(1, 2, 3, 4), everyone(4))
    probs_TE = logits_TE.softmax(-1)
    for row, cap in enumerate((1, 2, 3, 4)):
        best = probs_TE[row].argsort(descending=True)[:cap]
        assert used(routing, row) == best.tolist()
        assert torch.equal(routing.weights_TK[row, :cap], probs_TE[row, best]), (
            "FLAME: p_j of the k_i largest, not renormalised"
        )
        assert not bool(routing.weights_TK[row, cap:].any())


def test_padding_is_routed_nowhere() -> None:
    valid_T = torch.tensor([True, False, True])
    routing = route(logits(3), Spec(route_norm=True), caps(4, 4, 1), valid_T)
    assert routing.kept_TK.sum(1).tolist() == [4, 0, 1]
    assert torch.equal(routing.weights_TK[1], torch.zeros(TOP_K))


def test_renormalisation_is_over_the_kept_slots() -> None:
    routing = route(logits(2), Spec(route_norm=True, route_scale=2.5), caps(2, 4), everyone(2))
    assert torch.allclose(routing.weights_TK.sum(1), torch.tensor(2.5))
    probs_TE = logits(2).softmax(-1)
    first, second = used(routing, 0)
    assert float(routing.weights_TK[0, 0] / routing.weights_TK[0, 1]) == pytest.approx(
        float(probs_TE[0, first] / probs_TE[0, second])
    )


def test_masked_experts_are_never_used() -> None:
    allowed_TE = torch.zeros(3, EXPERTS, dtype=torch.bool)
    allowed_TE[0, [1, 5]] = True  # fewer than K
    allowed_TE[1] = True
    routing = route(logits(3), Spec(), caps(4, 4, 4), everyone(3), allowed_TE)
    assert sorted(used(routing, 0)) == [1, 5]
    assert used(routing, 1) == route(logits(3), Spec(), caps(4, 4, 4), everyone(3)).experts_TK[1].tolist()
    assert used(routing, 2) == [], "a row without any expert costs nothing"
    assert torch.equal(routing.weights_TK[0, 2:], torch.zeros(2))


@pytest.mark.parametrize("renormalised", [False, True])
def test_a_router_of_the_held_experts_is_one_without_the_other_rows(renormalised: bool) -> None:
    """Weights and gradients; a row that may use all experts keeps its bits, one that may use none stays a number."""
    spec, held = Spec(route_norm=renormalised), [1, 2, 5]
    allowed_TE = torch.zeros(3, EXPERTS, dtype=torch.bool)
    allowed_TE[0, held], allowed_TE[1] = True, True
    logits_TE = logits(3).requires_grad_()
    routing = route(logits_TE, spec, caps(2, 4, 4), everyone(3), allowed_TE, held_softmax=True)
    small_TE = logits_TE.detach()[:1, held].requires_grad_()
    expected = small_TE.softmax(-1).topk(2)
    weights_K = expected.values[0] / (expected.values.sum() if renormalised else 1.0)
    assert used(routing, 0) == [held[place] for place in expected.indices[0].tolist()]
    assert torch.allclose(routing.weights_TK[0, :2], weights_K)
    plain = route(logits_TE, spec, caps(2, 4, 4), everyone(3))
    assert torch.equal(routing.weights_TK[1], plain.weights_TK[1]) and torch.equal(routing.probs_TE, plain.probs_TE)
    (routing.weights_TK[0] * torch.arange(4)).sum().backward()
    (weights_K * torch.arange(2)).sum().backward()
    assert logits_TE.grad is not None and small_TE.grad is not None
    assert torch.allclose(logits_TE.grad[0, held], small_TE.grad[0], atol=1e-7) and not logits_TE.grad[0, [0, 3, 4]].any()
    assert not routing.weights_TK[2].any() and not torch.isnan(logits_TE.grad).any()


@pytest.mark.parametrize("score_func", ["max", "top2_sum"])
def test_only_the_best_groups_stay_eligible(score_func: str) -> None:
    logits_TE = logits(20)
    spec = Spec(num_expert_groups=4, num_limited_groups=2, group_score_func=score_func, top_k=3)
    routing = route(logits_TE, spec, caps(*[3] * 20), everyone(20))
    grouped = logits_TE.softmax(-1).unflatten(1, (4, 2))
    score = grouped.amax(-1) if score_func == "max" else grouped.sum(-1)
    for row in range(20):
        groups = set(score[row].topk(2).indices.tolist())
        assert {expert // 2 for expert in used(routing, row)} <= groups
        assert len(used(routing, row)) == 3


def test_correction_bias_chooses_but_does_not_weigh() -> None:
    bias_E = torch.zeros(EXPERTS)
    bias_E[3] = 10.0
    routing = route(logits(5), Spec(score_func="sigmoid", e_score_correction_bias=bias_E), caps(*[1] * 5), everyone(5))
    assert routing.experts_TK[:, 0].tolist() == [3] * 5
    assert torch.equal(routing.weights_TK[:, 0], logits(5).sigmoid()[:, 3])


def test_ties_fall_the_same_way_in_any_company() -> None:
    """Equal scores are cut at the cap; which expert wins must not depend on the other rows of the batch."""
    logits_TE = torch.zeros(6, EXPERTS)
    logits_TE[2:4, 5] = 1.0
    together = route(logits_TE, Spec(), caps(*[2] * 6), everyone(6))
    for row in range(6):
        single = route(logits_TE[row : row + 1], Spec(), caps(2), everyone(1))
        assert used(single, 0) == used(together, row)
        assert len(set(used(together, row))) == 2
    assert used(together, 2)[0] == 5


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, TOP_K), st.integers(0, 10**6))
def test_a_smaller_cap_keeps_a_prefix(rows: int, cap: int, seed: int) -> None:
    full = route(logits(rows, seed), Spec(), caps(*[TOP_K] * rows), everyone(rows))
    capped = route(logits(rows, seed), Spec(), caps(*[cap] * rows), everyone(rows))
    assert torch.equal(capped.kept_TK.sum(1), torch.full((rows,), cap))
    assert torch.equal(full.experts_TK[:, :cap], capped.experts_TK[:, :cap])
    assert torch.equal(full.weights_TK[:, :cap], capped.weights_TK[:, :cap])
    alone = route(logits(rows, seed)[-1:], Spec(), caps(cap), everyone(1))
    assert torch.equal(alone.weights_TK[0], capped.weights_TK[-1]), "a row's bits depend on the row alone"


def test_gradients_reach_the_logits_through_kept_weights_only() -> None:
    logits_TE = logits(2).requires_grad_()
    routing = route(logits_TE, Spec(), caps(1, 4), torch.tensor([True, False]))
    routing.weights_TK.sum().backward()
    assert logits_TE.grad is not None
    assert bool(logits_TE.grad[0].any()) and not bool(logits_TE.grad[1].any())


# A bias on the candidates' logits


def by_hand(logits_E: Tensor, bias_E: Tensor, candidates: int, cap: int) -> tuple[list[int], list[float]]:
    """The experts of one row, best first, and what they weigh."""
    near = sorted(range(EXPERTS), key=lambda e: -float(logits_E[e]))[:candidates]
    moved = [float(logits_E[e]) + (float(bias_E[e]) if e in near else 0.0) for e in range(EXPERTS)]
    whole = sum(math.exp(m) for m in moved)
    best = sorted(near, key=lambda e: -moved[e])[:cap]
    return best, [math.exp(moved[e]) / whole for e in best]


@settings(max_examples=30, derandomize=True)
@given(st.integers(0, 999), st.integers(1, TOP_K), st.integers(TOP_K, EXPERTS), st.floats(0.0, 3.0))
def test_a_bias_moves_the_choice_among_the_candidates(seed: int, cap: int, candidates: int, scale: float) -> None:
    logits_TE, bias_TE = logits(5, seed), scale * logits(5, seed + 1000)
    routing = route(logits_TE, Spec(), caps(*[cap] * 5), everyone(5), modulation=Modulation(bias_TE, candidates))
    for row in range(5):
        experts, weights = by_hand(logits_TE[row], bias_TE[row], candidates, cap)
        assert used(routing, row) == experts
        assert routing.weights_TK[row, :cap].tolist() == pytest.approx(weights, rel=1e-5)


def test_no_bias_is_no_change_to_the_bit() -> None:
    logits_TE, none_TE = logits(30), torch.zeros(30, EXPERTS)
    plain = route(logits_TE, Spec(), caps(*[3] * 30), everyone(30))
    for candidates in range(TOP_K, EXPERTS + 1):
        same = route(logits_TE, Spec(), caps(*[3] * 30), everyone(30), modulation=Modulation(none_TE, candidates))
        for name in ("probs_TE", "weights_TK", "kept_TK"):
            assert torch.equal(getattr(plain, name), getattr(same, name)), (name, candidates)
        assert torch.equal(plain.experts_TK, same.experts_TK)


def test_what_a_bias_cannot_change() -> None:
    logits_TE, bias_TE = logits(30), 3.0 * logits(30, 1)
    cap_T, plain = caps(*[TOP_K] * 30), route(logits(30), Spec(), caps(*[TOP_K] * 30), everyone(30))
    # As many candidates as are chosen: the set stays, the weights do not.
    few = route(logits_TE, Spec(), cap_T, everyone(30), modulation=Modulation(bias_TE, TOP_K))
    assert torch.equal(few.experts_TK.sort(1).values, plain.experts_TK.sort(1).values)
    assert not torch.allclose(few.weights_TK.sort(1).values, plain.weights_TK.sort(1).values)
    # The same for all experts of which all are candidates: nothing.
    even = route(logits_TE, Spec(), cap_T, everyone(30), modulation=Modulation(torch.full((30, EXPERTS), 0.7), EXPERTS))
    assert torch.equal(even.experts_TK, plain.experts_TK) and torch.allclose(even.weights_TK, plain.weights_TK)


def test_a_bias_leaves_groups_corrections_and_masks_as_they_are() -> None:
    spec = Spec(
        num_expert_groups=4, num_limited_groups=3, score_func="sigmoid", route_norm=True, e_score_correction_bias=logits(1)[0]
    )
    logits_TE, bias_TE, allowed_TE = logits(40), 3.0 * logits(40, 1), logits(40, 2) > -0.5
    plain = route(logits_TE, spec, caps(*[TOP_K] * 40), everyone(40))
    biased = route(logits_TE, spec, caps(*[TOP_K] * 40), everyone(40), modulation=Modulation(bias_TE, 5))
    assert torch.equal(plain.kept_TK, biased.kept_TK) and biased.kept_TK.sum() == kept_slots([Demand(40, TOP_K)], spec)
    assert not torch.equal(plain.experts_TK.sort(1).values, biased.experts_TK.sort(1).values)
    masked, freely = (
        route(logits_TE, spec, caps(*[TOP_K] * 40), everyone(40), allowed_TE, modulation=modulation)
        for modulation in (Modulation(bias_TE, 5), None)
    )
    assert torch.equal(masked.kept_TK, freely.kept_TK), "as many as may be chosen"
    assert allowed_TE.gather(1, masked.experts_TK)[masked.kept_TK].all()


def test_a_bias_on_experts_that_a_row_may_not_use_moves_nothing() -> None:
    """Also where fewer may be used than there are candidates, and whatever their bias is."""
    logits_TE, bias_TE = logits(30), 3.0 * logits(30, 1)
    allowed_TE = (torch.arange(EXPERTS) % 3 == 0).expand(30, EXPERTS)
    other_TE = torch.where(allowed_TE, bias_TE, 5.0)
    found, same = (
        route(logits_TE, Spec(), caps(*[TOP_K] * 30), everyone(30), allowed_TE, modulation=Modulation(bias, TOP_K + 2))
        for bias in (bias_TE, other_TE)
    )
    assert torch.equal(found.probs_TE, same.probs_TE) and torch.equal(found.weights_TK, same.weights_TK)
    assert found.kept_TK.sum(1).tolist() == [3] * 30


def test_the_router_learns_through_a_bias() -> None:
    logits_TE = logits(6).requires_grad_()
    route(logits_TE, Spec(), caps(*[2] * 6), everyone(6), modulation=Modulation(logits(6, 1), 6)).weights_TK.sum().backward()
    assert logits_TE.grad is not None and bool(logits_TE.grad.any())
