"""Routing: caps, masks, padding, expert groups, renormalisation, ties. Legend: T rows, E experts, K top-k."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmoe_ds.model.router import Routing, route

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
