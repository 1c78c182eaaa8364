"""Expert pass: the routed rows of a layer travel to the ranks that hold their experts, through them, and back.

Two functions of autograd make it up, so that what is recorded between them is computed while rows travel: in the forward pass
on their way to the experts, in the backward pass on the way home of their gradients.

Where a plan has two halves, all rows set out at once. Those of the second travel while the products of the first are computed,
and what these put out goes home while those of the second are computed; in the backward pass likewise. Exchanges over a group
run in the order in which they were started, which is the same on all ranks whatever they have to send.

Legend: T token rows at home, N routed rows, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fedmoe_ds.distributed.collectives import Exchange
from fedmoe_ds.model.dispatcher import Part, Plan, Pool
from fedmoe_ds.model.experts import Experts
from fedmoe_ds.model.router import Routing


class _Trip:
    """The rows of one layer on their way to their experts and back.

    Attributes:
        need_dx: whether the layer's input needs a gradient. The same on all ranks of the group: layers are, and an idle rank's
            stand-in needs a gradient where rows do. Otherwise an exchange would wait forever.
        there: by part of the plan, the rows and their weights on their way to the experts.
        back: the gradients of weights and rows on their way home; of rows only where `need_dx`.
    """

    def __init__(self, plan: Plan, pool: Pool, need_dx: bool) -> None:
        self.plan, self.pool, self.need_dx = plan, pool, need_dx
        self.there: list[list[_Travel]] = []
        self.back: list[_WayHome] = []


class _Departure(torch.autograd.Function):
    """Gather, and set out for the experts; in reverse the gradients arrive here, and are summed by token.

    Autograd runs first what was recorded last, so what stands between this and `_AtExperts` comes between the two in the
    backward pass as well.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_N: Tensor, anchor: Tensor, trip: _Trip) -> Tensor:
        ctx.trip, plan, pool = trip, trip.plan, trip.pool
        # Two exchanges, rows and then their weights: the experts apply the weight themselves, before the down projection.
        p_N1 = weight_N.to(x_TD.dtype).unsqueeze(-1)
        for part in plan.parts:
            rows_ND = _gather(x_TD, plan.tokens_N[part.home])
            trip.there.append([_Travel.to_experts(rows, part, pool) for rows in (rows_ND, p_N1[part.home])])
        # A number that nobody reads: it ties the two functions together in the graph.
        return x_TD.new_empty(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        trip: _Trip = ctx.trip
        dp_N, *dx_ND = [home.arrived() for home in trip.back]
        trip.back = []
        return _sum_by_token(dx_ND[0], trip.plan) if dx_ND else None, dp_N.squeeze(-1), None, None


class _AtExperts(torch.autograd.Function):
    """Feed-forward, travel back, weighted sum; in reverse the gradients travel to the experts, and set out for home."""

    @staticmethod
    def forward(ctx: Any, tie: Tensor, trip: _Trip, experts: Experts) -> Tensor:
        # Kept as attributes: save_for_backward takes tensors alone, and none of these is an input or output of this function.
        ctx.trip, ctx.experts, ctx.saved = trip, experts, []
        plan, home = trip.plan, _WayHome(trip.plan, trip.pool)
        for part in plan.parts:
            # What has arrived is forgotten: rows that were sent need not be held while products are computed.
            rows_ND, p_N1 = [travel.arrived() for travel in trip.there.pop(0)]
            p_N, found = p_N1.squeeze(-1), []
            for block in part.blocks:
                rows = slice(block.start, block.stop)
                y_ND, kept = experts.forward(block, rows_ND[rows], p_N[rows])
                found.append(y_ND)
                ctx.saved.append(kept)
            home.sets_out(_join(found), part)
        return _sum_by_token(home.arrived(), plan)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        trip: _Trip = ctx.trip
        plan, pool, saved = trip.plan, trip.pool, ctx.saved
        there = [_Travel.to_experts(_gather(grads[0], plan.tokens_N[part.home]), part, pool) for part in plan.parts]
        trip.back = [_WayHome(plan, pool) for _ in range(1 + trip.need_dx)]
        for part in plan.parts:
            dy_ND = there.pop(0).arrived()
            dp_parts: list[Tensor] = []
            dx_parts: list[Tensor] = []
            for block in part.blocks:
                # Taken out: activations of a half are freed before the gradients travel, not when autograd drops the node.
                dx_ND, dp_N = ctx.experts.backward(block, saved.pop(0), dy_ND[block.start : block.stop], trip.need_dx)
                dp_parts.append(dp_N.unsqueeze(-1))
                if dx_ND is not None:
                    dx_parts.append(dx_ND)
            for home, parts in zip(trip.back, (dp_parts, dx_parts), strict=False):
                home.sets_out(_join(parts), part)
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
    """Rows of a part on their way to the ranks of their experts; without peers they are there at once."""

    def __init__(self, rows: Tensor, under_way: Exchange | None, order_N: Tensor | None = None) -> None:
        self.rows, self.under_way, self.order_N = rows, under_way, order_N

    @classmethod
    def to_experts(cls, rows: Tensor, part: Part, pool: Pool) -> _Travel:
        """Merged by expert when they have arrived, where the plan says so."""
        if pool.ep_size == 1:
            return cls(rows, None)
        return cls(rows, Exchange(rows, pool.group, part.receive, part.send), part.merge_N)

    def arrived(self) -> Tensor:
        """The rows for this rank's experts, once all are here."""
        rows = self.rows if self.under_way is None else self.under_way.wait()
        return rows if self.order_N is None else rows.index_select(0, self.order_N)


class _WayHome:
    """Results of all parts on their way to the ranks of their tokens, into one tensor in the order of the plan's rows."""

    def __init__(self, plan: Plan, pool: Pool) -> None:
        self.rows, self.pool = len(plan.tokens_N), pool
        self.whole: Tensor | None = None
        self.under_way: list[Exchange] = []

    def sets_out(self, rows: Tensor, part: Part) -> None:
        if self.pool.ep_size == 1:
            self.whole = rows
            return
        if self.whole is None:
            self.whole = rows.new_empty(self.rows, *rows.shape[1:])
        if part.unmerge_N is not None:
            rows = rows.index_select(0, part.unmerge_N)
        # Each half has its place, so that nothing need be joined when both are here.
        self.under_way.append(Exchange(rows, self.pool.group, part.send, part.receive, self.whole[part.home]))

    def arrived(self) -> Tensor:
        """The rows of this rank, once all are here."""
        for exchange in self.under_way:
            exchange.wait()
        self.under_way = []
        assert self.whole is not None, "nothing has set out"
        return self.whole


def _sum_by_token(rows_ND: Tensor, plan: Plan) -> Tensor:
    """Sum of each token's rows, in expert order; zero for a token without rows."""
    # A rank without routed rows (idle, or all of them padding) has exchanged like the others, and its result is zero.
    if rows_ND.shape[0] == 0:
        return rows_ND.new_zeros(plan.token_starts_T.shape[0], rows_ND.shape[1])
    # embedding_bag adds up one row after the other as listed; index_add_ would not promise an order on a GPU.
    return torch.embedding_bag(rows_ND, plan.by_token_N, plan.token_starts_T, mode=0)[0]
