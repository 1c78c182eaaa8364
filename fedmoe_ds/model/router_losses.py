"""Router losses: auxiliary, from raw logits, with padding left out.

Legend: T token rows, E experts, K top-k.

Hugging Face computes these only on request and, in this family, applies softmax twice; ours are the textbook forms and are
tested against hand-computed values. The z-loss is a mean over the valid rows of one client, which micro-batches add up to; the
balance loss is a product of two such means, so its rows are those of a whole local step.
"""

from __future__ import annotations

from torch import Tensor

from fedmoe_ds.model.router import Routing


def balance_loss(routing: Routing, held_H: Tensor | None = None, price_TE: Tensor | None = None) -> Tensor:
    """Switch / GShard load balance: E * sum_m f_m P_m; 1 when routing is uniform (methods 2.4 (a)).

    f_m is the share of routed slots that went to expert m (no gradient), P_m the mean normalised score of m; all
    rows are valid. Experts that add nothing are experts here.

    Args:
        held_H: int64, the experts of which the layer consists for these rows; None for all.
        price_TE: factor on the scores in P, for each row and expert; those that add nothing stand last. None: 1.
    """
    probs_TE, counts_E = routing.with_zeros()
    if held_H is not None:
        # The loss of a layer without the others: it must not draw rows to experts to which they cannot go.
        probs_TE, counts_E = probs_TE.index_select(1, held_H), counts_E.index_select(0, held_H)
    num_experts = probs_TE.shape[1]
    # Kept slots only: a capped client is judged by the experts that it really uses. Whole numbers have no gradient.
    share_E = counts_E / counts_E.sum().clamp(min=1)
    # Sigmoid scores do not sum to one, softmax scores do; the normalised form serves both.
    probs_TE = probs_TE / (probs_TE.sum(-1, keepdim=True) + 1e-20)
    if price_TE is not None:
        probs_TE = probs_TE * price_TE
    # Times zero and not a constant zero: the loss then keeps its place in the graph and backward finds a path.
    mean_E = probs_TE.mean(0) if len(probs_TE) else probs_TE.sum(0) * 0.0
    return num_experts * (share_E * mean_E).sum()


def z_loss(logits_TE: Tensor) -> Tensor:
    """ST-MoE router z-loss: mean over rows, which are all valid, of logsumexp(logits)^2."""
    return logits_TE.float().logsumexp(-1).square().mean() if len(logits_TE) else logits_TE.sum() * 0.0
