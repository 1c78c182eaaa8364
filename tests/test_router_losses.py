"""Auxiliary router losses against values worked out by hand. Legend: T rows, E experts, K top-k."""

from __future__ import annotations

import math

import pytest
import torch

from fedmoe_ds.model.router import Routing
from fedmoe_ds.model.router_losses import balance_loss, z_loss


def routing(probs: list[list[float]], experts: list[list[int]], kept: list[list[bool]]) -> Routing:
    probs_TE, experts_TK, kept_TK = torch.tensor(probs), torch.tensor(experts), torch.tensor(kept)
    return Routing(probs_TE, probs_TE.gather(1, experts_TK) * kept_TK, experts_TK, kept_TK)


def test_balance_by_hand() -> None:
    """Slots: expert 0 twice, 1 once, 2 once of 4; mean scores 0.45, 0.25, 0.3: 3 (0.5*0.45 + 0.25*0.25 + 0.25*0.3) = 1.0875."""
    decision = routing([[0.5, 0.3, 0.2], [0.4, 0.2, 0.4]], [[0, 1], [0, 2]], [[True, True], [True, True]])
    assert float(balance_loss(decision)) == pytest.approx(1.0875, rel=1e-6)


def test_balance_counts_kept_slots_only() -> None:
    """With a cap of one, only expert 0 gets rows: 3 * 0.45 = 1.35."""
    decision = routing([[0.5, 0.3, 0.2], [0.4, 0.2, 0.4]], [[0, 1], [0, 2]], [[True, False], [True, False]])
    assert float(balance_loss(decision)) == pytest.approx(1.35, rel=1e-6)


def test_balance_of_the_held_experts_is_that_of_a_layer_without_the_others() -> None:
    """Experts 0 and 2: scores 5/7, 1/2 and 2/7, 1/2; three slots, two of them at expert 0: 2 (2/3 * 17/28 + 1/3 * 11/28)."""
    decision = routing([[0.5, 0.3, 0.2], [0.4, 0.2, 0.4]], [[0, 2], [0, 2]], [[True, False], [True, True]])
    assert float(balance_loss(decision, torch.tensor([0, 2]))) == pytest.approx(15 / 14, rel=1e-6)


def test_balance_leaves_padding_out() -> None:
    decision = routing(
        [[0.5, 0.3, 0.2], [0.0, 0.0, 1.0], [0.4, 0.2, 0.4]],
        [[0, 1], [2, 0], [0, 2]],
        [[True, True], [False, False], [True, True]],
    )
    assert float(balance_loss(decision.rows(torch.tensor([0, 2])))) == pytest.approx(1.0875, rel=1e-6)


def test_balance_is_one_when_uniform() -> None:
    decision = routing([[0.25] * 4] * 4, [[0], [1], [2], [3]], [[True]] * 4)
    assert float(balance_loss(decision)) == pytest.approx(1.0, rel=1e-6)


def test_balance_normalises_sigmoid_scores() -> None:
    """Scores 0.8, 0.4, 0.4 become 0.5, 0.25, 0.25; all slots on expert 0: 3 * 0.5."""
    decision = routing([[0.8, 0.4, 0.4]], [[0]], [[True]])
    assert float(balance_loss(decision)) == pytest.approx(1.5, rel=1e-6)


def test_z_by_hand() -> None:
    """logsumexp of (0, 0) is ln 2, of (ln 3, 0) it is ln 4: mean of the squares."""
    logits_TE = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    expected = (math.log(2.0) ** 2 + math.log(4.0) ** 2) / 2
    assert float(z_loss(logits_TE)) == pytest.approx(expected, rel=1e-6)


def test_gradients_by_hand() -> None:
    """d/dp_e of E sum f_e mean p_e is E f_e / T before normalisation; padding gets none, and f carries no gradient."""
    probs_TE = torch.tensor([[0.5, 0.5], [0.5, 0.5]], requires_grad=True)
    experts_TK, kept_TK = torch.tensor([[0], [0]]), torch.tensor([[True], [False]])
    decision = Routing(probs_TE, probs_TE.gather(1, experts_TK), experts_TK, kept_TK)
    balance_loss(decision.rows(slice(0, 1))).backward()
    assert probs_TE.grad is not None
    # normalised p_0 = p_0 / (p_0 + p_1): derivative (0.5, -0.5), times E f_0 = 2
    assert torch.allclose(probs_TE.grad, torch.tensor([[1.0, -1.0], [0.0, 0.0]]))


def test_no_valid_row_gives_zero_and_a_gradient_path() -> None:
    logits_TE = torch.ones(2, 3, requires_grad=True)
    probs_TE = logits_TE.softmax(-1)
    decision = Routing(probs_TE, probs_TE[:, :1] * 0, torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.bool))
    total = balance_loss(decision.rows(slice(0, 0))) + z_loss(logits_TE[:0])
    total.backward()
    assert float(total.detach()) == 0.0 and logits_TE.grad is not None and not bool(logits_TE.grad.any())
