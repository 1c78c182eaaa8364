"""Expert pass: the routed rows of a layer travel to the ranks that hold their experts, through them, and back.

Two functions of autograd make it up, so that what is recorded between them is computed while rows travel: in the forward pass
on their way to the experts, in the backward pass on the way home of their gradients.

Legend: T token rows at home, N routed rows, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fedmoe_ds.distributed.collectives import Exchange
from fedmoe_ds.model.dispatcher import Plan, Pool
from fedmoe_ds.model.experts import Experts
from fedmoe_ds.model.router import Routing


class _Trip:
    """The rows of one layer on their way to their experts and back.

    Attributes:
        need_dx: whether the layer's input needs a gradient. The same on all ranks of the group: layers are, and an idle rank's
            stand-in needs a gradient where rows do. Otherwise an exchange would wait forever.
        there: the rows and their weights on their way to the experts.
        back: the gradients of weights and rows on their way home; of rows only where `need_dx`.
    """

    def __init__(self, plan: Plan, pool: Pool, need_dx: bool) -> None:
        self.plan, self.pool, self.need_dx = plan, pool, need_dx
        self.there: list[_Travel] = []
        self.back: list[_Travel] = []


class _Departure(torch.autograd.Function):
    """Gather, and set out for the experts; in reverse the gradients arrive here, and are summed by token.

    Autograd runs first what was recorded last, so what stands between this and `_AtExperts` comes between the two in the
    backward pass as well.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_N: Tensor, anchor: Tensor, trip: _Trip) -> Tensor:
        ctx.trip, plan, pool = trip, trip.plan, trip.pool
        # Two exchanges, rows and then their weights: the experts apply the weight themselves, before the down projection.
        rows_ND, p_N1 = _gather(x_TD, plan.tokens_N), weight_N.to(x_TD.dtype).unsqueeze(-1)
        trip.there = [_Travel.to_experts(rows_ND, plan, pool), _Travel.to_experts(p_N1, plan, pool)]
        # A number that nobody reads: it ties the two functions together in the graph.
        return x_TD.new_empty(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        trip: _Trip = ctx.trip
        dp_N, *dx_ND = [travel.arrived() for travel in trip.back]
        trip.back = []
        return _sum_by_token(dx_ND[0], trip.plan) if dx_ND else None, dp_N.squeeze(-1), None, None


class _AtExperts(torch.autograd.Function):
    """Feed-forward, travel back, weighted sum; in reverse the gradients travel to the experts, and set out for home."""

    @staticmethod
    def forward(ctx: Any, tie: Tensor, trip: _Trip, experts: Experts) -> Tensor:
        rows_ND, p_N1 = [travel.arrived() for travel in trip.there]
        trip.there, p_N, saved, parts = [], p_N1.squeeze(-1), [], []
        for block in trip.plan.blocks:
            rows = slice(block.start, block.stop)
            part, kept = experts.forward(block, rows_ND[rows], p_N[rows])
            parts.append(part)
            saved.append(kept)
        # Kept as attributes: save_for_backward takes tensors alone, and none of these is an input or output of this function.
        ctx.trip, ctx.experts, ctx.saved = trip, experts, saved
        return _sum_by_token(_Travel.home(_join(parts), trip.plan, trip.pool).arrived(), trip.plan)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        trip: _Trip = ctx.trip
        plan, pool = trip.plan, trip.pool
        dy_ND = _Travel.to_experts(_gather(grads[0], plan.tokens_N), plan, pool).arrived()
        dx_parts: list[Tensor] = []
        dp_parts: list[Tensor] = []
        for block, saved in zip(plan.blocks, ctx.saved, strict=True):
            rows = slice(block.start, block.stop)
            dx, dp = ctx.experts.backward(block, saved, dy_ND[rows], trip.need_dx)
            if dx is not None:
                dx_parts.append(dx)
            dp_parts.append(dp)
        # Activations are freed before the gradients travel, not when autograd drops the node.
        ctx.saved = None
        trip.back = [_Travel.home(_join(dp_parts).unsqueeze(-1), plan, pool)]
        if trip.need_dx:
            trip.back.append(_Travel.home(_join(dx_parts), plan, pool))
        return grads[0].new_empty(()), None, None


def send_to_experts(x_TD: Tensor, routing: Routing, anchor: Tensor, plan: Plan, pool: Pool) -> Callable[[Experts], Tensor]:
    """Set the rows of a layer out for their experts.

    Returns what gives y_t = sum over the kept experts j of t of  p_tj E_j(x_t), [T, D]. What is computed before it is called
    is computed while the rows travel.

    Args:
        anchor: requires a gradient, so that adapters are reached even where x needs none. Their gradients go to the bank.
    """
    trip = _Trip(plan, pool, x_TD.requires_grad)
    weight_N = routing.weights_TK.flatten().index_select(0, plan.slots_N)
    tie: Tensor = _Departure.apply(x_TD, weight_N, anchor, trip)  # type: ignore[no-untyped-call]

    def at_experts(experts: Experts) -> Tensor:
        return _AtExperts.apply(tie, trip, experts)  # type: ignore[no-any-return, no-untyped-call]

    return at_experts


def expert_pass(x_TD: Tensor, routing: Routing, anchor: Tensor, plan: Plan, pool: Pool, experts: Experts) -> Tensor:
    """`send_to_experts`, with nothing to do meanwhile."""
    return send_to_experts(x_TD, routing, anchor, plan, pool)(experts)


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _gather(x_TD: Tensor, tokens_N: Tensor) -> Tensor:
    return torch.embedding(x_TD, tokens_N)  # the fastest row gather on CPU


class _Travel:
    """Rows on their way from rank to rank; without peers they are there at once."""

    def __init__(self, rows: Tensor, under_way: Exchange | None, order_N: Tensor | None = None) -> None:
        self.rows, self.under_way, self.order_N = rows, under_way, order_N

    @classmethod
    def to_experts(cls, rows: Tensor, plan: Plan, pool: Pool) -> _Travel:
        """To the ranks of their experts; merged by expert when they have arrived, where the plan says so."""
        if pool.ep_size == 1:
            return cls(rows, None)
        return cls(rows, Exchange(rows, pool.group, plan.receive, plan.send), plan.merge_N)

    @classmethod
    def home(cls, rows: Tensor, plan: Plan, pool: Pool) -> _Travel:
        """The way back."""
        if pool.ep_size == 1:
            return cls(rows, None)
        if plan.unmerge_N is not None:
            rows = rows.index_select(0, plan.unmerge_N)
        return cls(rows, Exchange(rows, pool.group, plan.send, plan.receive))

    def arrived(self) -> Tensor:
        """The rows of this rank, once all are here."""
        rows = self.rows if self.under_way is None else self.under_way.wait()
        return rows if self.order_N is None else rows.index_select(0, self.order_N)


def _sum_by_token(rows_ND: Tensor, plan: Plan) -> Tensor:
    """Sum of each token's rows, in expert order; zero for a token without rows."""
    # A rank without routed rows (idle, or all of them padding) has exchanged like the others, and its result is zero.
    if rows_ND.shape[0] == 0:
        return rows_ND.new_zeros(plan.token_starts_T.shape[0], rows_ND.shape[1])
    # embedding_bag adds up one row after the other as listed; index_add_ would not promise an order on a GPU.
    return torch.embedding_bag(rows_ND, plan.by_token_N, plan.token_starts_T, mode=0)[0]
