"""Dispatcher: routed rows travel to the ranks that hold their experts, and back.

Legend: T token rows at home, N routed rows, D model width, E experts of the model, P expert-parallel ranks, S client segments
of a pass.

Only kept (token, expert) slots become rows, so a capped client pays for its cap alone. Rows are sorted by (expert, segment);
what arrives from one peer is therefore sorted too. In `bitwise` mode every peer's rows form a block of their own, because a
peer sends one client's rows per pass; in `fast` mode all rows are merged by expert first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

from fedmoe_ds.distributed.collectives import all_to_all
from fedmoe_ds.model.experts import Block, Experts
from fedmoe_ds.model.router import Routing


@dataclass(frozen=True)
class Pool:
    """The expert pool as one rank sees it, and the client slots of the wave.

    `home_clients` is the number of client slots per rank; wave slot = shard * home_clients + home slot, where `shard` is the
    rank's place in its cluster. With `shared` all rows use the adapters at slot 0 (evaluation of the global model).
    """

    group: torch_dist.ProcessGroup | None
    ep_size: int
    num_experts: int
    home_clients: int
    merge: bool  # fast mode: one block for all clients
    shared: bool = False
    shard: int = 0

    def wave_slot(self, peer: int, slot: int) -> int:
        return 0 if self.shared else peer * self.home_clients + slot

    @property
    def local_experts(self) -> int:
        return self.num_experts // self.ep_size

    @property
    def wave_clients(self) -> int:
        return self.ep_size * self.home_clients


@dataclass(frozen=True)
class Plan:
    """Who sends what to whom in one layer of one pass (no gradients in here)."""

    tokens_N: Tensor  # home token of each routed row, rows sorted by (expert, segment)
    slots_N: Tensor  # its position in the flattened [T, K]
    by_token_N: Tensor  # rows sorted by token, for the weighted sum
    token_starts_T: Tensor  # first entry of each token in by_token_N
    # Rows per peer, as lists on the host: the all-to-all takes its split sizes from there.
    send: list[int]
    receive: list[int]
    merge_N: Tensor | None  # order that merges what several peers sent (fast mode)
    unmerge_N: Tensor | None
    blocks: list[Block]


def make_plan(routing: Routing, segment_T: Tensor, slot: int | None, pool: Pool) -> Plan:
    """Plan one layer.

    Args:
        routing: the decision for this rank's rows.
        segment_T: home client slot of each row.
        slot: the home slot that all ranks run in this pass (bitwise), or None when all slots run together (fast).
        pool: the expert pool.
    """
    top_k = routing.kept_TK.shape[1]
    flat_N = routing.kept_TK.flatten().nonzero().squeeze(1)
    # With a common slot all rows of a rank are one client's, so the expert alone tells groups apart.
    groups = 1 if slot is not None else pool.home_clients
    key_N = routing.experts_TK.flatten()[flat_N] * groups
    if slot is None:
        key_N = key_N + segment_T[flat_N // top_k]
    # Stable: rows of one group stay in token order, so sums over a client's rows run in the same order on every topology.
    key_N, order_N = key_N.sort(stable=True)
    slots_N = flat_N[order_N]
    tokens_N = slots_N // top_k
    counts_PES = torch.bincount(key_N, minlength=pool.num_experts * groups)
    counts_PES = counts_PES.view(pool.ep_size, pool.local_experts, groups)
    # Every rank of the group comes here in every pass, with rows or without: the exchange of rows needs its counts.
    received_PES = _exchange_counts(counts_PES, pool)
    send, receive = counts_PES.sum((1, 2)).tolist(), received_PES.sum((1, 2)).tolist()
    # Stable again: a token's rows stay in expert order, so its sum is taken in one order wherever the experts are.
    by_token_N = tokens_N.argsort(stable=True)
    per_token_T = torch.bincount(tokens_N, minlength=segment_T.shape[0])
    merge_N, unmerge_N, blocks = _blocks(received_PES, receive, slot, pool)
    # Exclusive prefix sums; a token without rows gets an empty range and with it a sum of zero.
    return Plan(tokens_N, slots_N, by_token_N, per_token_T.cumsum(0) - per_token_T, send, receive, merge_N, unmerge_N, blocks)


def _exchange_counts(counts_PES: Tensor, pool: Pool) -> Tensor:
    if pool.ep_size == 1:
        return counts_PES
    received = torch.empty_like(counts_PES)
    all_to_all(received, counts_PES.contiguous(), group=pool.group)
    return received


def _blocks(
    received_PES: Tensor, receive: list[int], slot: int | None, pool: Pool
) -> tuple[Tensor | None, Tensor | None, list[Block]]:
    if slot is not None:
        blocks, start = [], 0
        for peer, rows in enumerate(receive):
            # grouped_mm takes int32 ends.
            ends = received_PES[peer, :, 0].cumsum(0).to(torch.int32)
            blocks.append(Block(start, start + rows, pool.wave_slot(peer, slot), ends, ends))
            start += rows
        return None, None, blocks
    # [P, E, S] -> [E, P, S]: for each expert, the wave slots of all peers in order.
    by_expert_EC = received_PES.transpose(0, 1).reshape(pool.local_experts, -1)
    ends_G = by_expert_EC.flatten().cumsum(0).to(torch.int32)
    ends_E = by_expert_EC.sum(1).cumsum(0).to(torch.int32)
    # One block for all: base weights are shared, so an expert's product runs over the rows of all clients at once.
    block = Block(0, sum(receive), None, ends_E, ends_G)
    if pool.ep_size == 1:
        return None, None, [block]
    # Rows arrive in (peer, expert, slot) order and are wanted in (expert, peer, slot) order. Every arrived row gets the number
    # of its group in the wanted order; a stable sort of these numbers is the merge.
    group_PES = torch.arange(received_PES.numel(), device=received_PES.device)
    group_PES = group_PES.view(pool.local_experts, pool.ep_size, -1).transpose(0, 1).reshape(-1)
    merge_N = group_PES.repeat_interleave(received_PES.flatten()).argsort(stable=True)
    unmerge_N = torch.empty_like(merge_N)
    unmerge_N[merge_N] = torch.arange(len(merge_N), device=merge_N.device)
    return merge_N, unmerge_N, [block]


class _ExpertPass(torch.autograd.Function):
    """Gather, travel, feed-forward, travel back, weighted sum; and the same in reverse."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_N: Tensor,
        anchor: Tensor,
        plan: Plan,
        pool: Pool,
        experts: Experts,
    ) -> Tensor:
        # Two exchanges, rows and then their weights: the experts apply the weight themselves, before the down projection.
        rows_ND = _to_experts(_gather(x_TD, plan.tokens_N), plan, pool)
        p_N = _to_experts(weight_N.to(x_TD.dtype).unsqueeze(-1), plan, pool).squeeze(-1)
        saved, parts = [], []
        for block in plan.blocks:
            rows = slice(block.start, block.stop)
            part, kept = experts.forward(block, rows_ND[rows], p_N[rows])
            parts.append(part)
            saved.append(kept)
        # Kept as attributes: save_for_backward takes tensors alone, and none of these is an input or output of this function.
        ctx.plan, ctx.pool, ctx.experts, ctx.saved = plan, pool, experts, saved
        return _sum_by_token(_to_home(_join(parts), plan, pool), plan)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # `need_dx` is the same on all ranks of the group: layers are, and an idle rank's stand-in needs a gradient where rows
        # do. Otherwise the exchange at the end would wait forever.
        plan, pool, need_dx = ctx.plan, ctx.pool, ctx.needs_input_grad[0]
        dy_ND = _to_experts(_gather(grads[0], plan.tokens_N), plan, pool)
        dx_parts: list[Tensor] = []
        dp_parts: list[Tensor] = []
        for block, saved in zip(plan.blocks, ctx.saved, strict=True):
            rows = slice(block.start, block.stop)
            dx, dp = ctx.experts.backward(block, saved, dy_ND[rows], need_dx)
            if dx is not None:
                dx_parts.append(dx)
            dp_parts.append(dp)
        # Activations are freed before the gradients travel, not when autograd drops the node.
        ctx.saved = None
        dp_N = _to_home(_join(dp_parts).unsqueeze(-1), plan, pool).squeeze(-1)
        dx_TD = _sum_by_token(_to_home(_join(dx_parts), plan, pool), plan) if need_dx else None
        return dx_TD, dp_N, None, None, None, None


def expert_pass(
    x_TD: Tensor,
    routing: Routing,
    anchor: Tensor,
    plan: Plan,
    pool: Pool,
    experts: Experts,
) -> Tensor:
    """y_t = sum over the kept experts j of t of  p_tj E_j(x_t).  Returns [T, D].

    `anchor` requires a gradient, so that adapters are reached even where x needs none. Their gradients go to the bank.
    """
    weight_N = routing.weights_TK.flatten()[plan.slots_N]
    return _ExpertPass.apply(x_TD, weight_N, anchor, plan, pool, experts)  # type: ignore[no-any-return, no-untyped-call]


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _gather(x_TD: Tensor, tokens_N: Tensor) -> Tensor:
    return torch.embedding(x_TD, tokens_N)  # the fastest row gather on CPU


def _to_experts(rows: Tensor, plan: Plan, pool: Pool) -> Tensor:
    if pool.ep_size == 1:
        return rows
    arrived = rows.new_empty(sum(plan.receive), rows.shape[1])
    all_to_all(arrived, rows.contiguous(), pool.group, plan.receive, plan.send)
    return arrived if plan.merge_N is None else arrived.index_select(0, plan.merge_N)


def _to_home(rows: Tensor, plan: Plan, pool: Pool) -> Tensor:
    if pool.ep_size == 1:
        return rows
    if plan.unmerge_N is not None:
        rows = rows.index_select(0, plan.unmerge_N)
    arrived = rows.new_empty(sum(plan.send), rows.shape[1])
    all_to_all(arrived, rows.contiguous(), pool.group, plan.send, plan.receive)
    return arrived


def _sum_by_token(rows_ND: Tensor, plan: Plan) -> Tensor:
    """Sum of each token's rows, in expert order; zero for a token without rows."""
    # A rank without routed rows (idle, or all of them padding) has exchanged like the others, and its result is zero.
    if rows_ND.shape[0] == 0:
        return rows_ND.new_zeros(plan.token_starts_T.shape[0], rows_ND.shape[1])
    # embedding_bag adds up one row after the other as listed; index_add_ would not promise an order on a GPU.
    return torch.embedding_bag(rows_ND, plan.by_token_N, plan.token_starts_T, mode=0)[0]
