"""Routed forward: what every layer with an expert pool does with its routing, whatever its experts are.

Legend: B sequences, S positions, T = B * S token rows, D model width, E experts, C client slots.

`record_routing` counts activations, asks the method what it wants to see and collects auxiliary losses; `routed_forward` sends
the rows through the pool. Where a method lets a batch train only some experts, the rows of the others go through the pool
without autograd: nothing of them is kept for the backward pass, and neither their adapters, nor their inputs, nor the router
get a gradient through them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fedmoe_ds.kernels.per_client import Segment
from fedmoe_ds.model import router_losses
from fedmoe_ds.model.dispatcher import expert_pass, make_plan
from fedmoe_ds.model.experts import Experts
from fedmoe_ds.model.pass_context import Execution, Pass
from fedmoe_ds.model.router import Routing


def routed_forward(execution: Execution, layer: int, x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """sum_j p_tj E_j(x_t) for every row, [T, D]. `record_routing` must have seen this routing."""
    run = execution.running()
    active_TK = _active_slots(execution, layer, routing)
    if active_TK is None:
        return _through_pool(execution, run, x_TD, routing, experts)
    # The two masks part the kept slots: every routed row is computed once, with autograd or without.
    held_back_TK = routing.kept_TK & ~active_TK
    y_TD = _through_pool(execution, run, x_TD, replace(routing, kept_TK=routing.kept_TK & active_TK), experts)
    with torch.no_grad():
        # Nothing is saved here, so held-back rows cost no memory for the backward pass and no product in it.
        held_TD = _through_pool(execution, run, x_TD, replace(routing, kept_TK=held_back_TK), experts)
    return y_TD + held_TD


def _through_pool(execution: Execution, run: Pass, x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
    plan = make_plan(routing, run.slot_T, run.slot, execution.pool)
    return expert_pass(x_TD, routing, execution.anchor, plan, execution.pool, experts)


def record_routing(execution: Execution, layer: int, routing: Routing, logits_TE: Tensor) -> None:
    """Write counts, observations and auxiliary losses of a layer. Overwrites: a recomputed layer counts once."""
    run = execution.running()
    run.counts[layer] = _count(execution, run, routing, routing.kept_TK)
    found_losses: dict[int, Tensor] = {}
    # Emptied, not added to: activation checkpointing runs the layer a second time in the backward pass.
    run.observed[layer] = {}
    for seg, rows in _own_rows(run, logits_TE.shape[0]):
        observer = execution.wave.observers.get(seg.slot)
        if observer is None and not (execution.balance or execution.z):
            continue
        own, valid_T, own_TE = _rows_of(routing, rows), run.valid_T[rows], logits_TE[rows]
        if observer is not None and observer.observe is not None:
            with torch.no_grad():
                active_E, sums = observer.observe(own, valid_T)
            run.observed[layer][seg.slot] = sums if active_E is None else {**sums, ACTIVE: active_E}
        loss = _auxiliary(execution, own, own_TE, valid_T)
        if observer is not None and observer.loss is not None:
            # With autograd, unlike `observe`: the method's loss trains the router (and, through the logits, what lies below).
            extra = observer.loss(layer, own, own_TE, valid_T)
            loss = extra if loss is None else (loss if extra is None else loss + extra)
        if loss is not None:
            found_losses[seg.slot] = loss
    # No entry for a layer without losses: the mean over layers looks up every client in each entry.
    if found_losses:
        run.losses[layer] = found_losses


ACTIVE = "active"
"""Where a pass keeps the mask of the experts that it trains, among the observations."""


def _active_slots(execution: Execution, layer: int, routing: Routing) -> Tensor | None:
    """[T, K] bool: routed slots that take part in the backward pass; None for all of them."""
    run = execution.running()
    masks = {slot: sums[ACTIVE] for slot, sums in run.observed[layer].items() if ACTIVE in sums}
    # Every rank of the cluster must take the same number of trips, whether or not it has rows in this pass.
    if not execution.wave.selective:
        return None
    # Clients whose observer names no experts train all that they are routed to.
    active_TK = torch.ones_like(routing.kept_TK)
    for seg, rows in _own_rows(run, routing.kept_TK.shape[0]):
        if seg.slot in masks:
            active_TK[rows] = masks[seg.slot][routing.experts_TK[rows]]
    run.trained[layer] = _count(execution, run, routing, routing.kept_TK & active_TK)
    return active_TK


@torch.no_grad()
def _count(execution: Execution, run: Pass, routing: Routing, slots_TK: Tensor) -> Tensor:
    """[H, E] int64: routed rows per home slot and expert."""
    experts, home = execution.pool.num_experts, execution.pool.home_clients
    # One count over (slot, expert) keys instead of one per client: the number of clients costs nothing.
    key_TK = run.slot_T.unsqueeze(-1) * experts + routing.experts_TK
    return torch.bincount(key_TK[slots_TK], minlength=home * experts).view(home, experts)


def _auxiliary(execution: Execution, own: Routing, logits_TE: Tensor, valid_T: Tensor) -> Tensor | None:
    if not (execution.balance or execution.z):
        return None
    total = logits_TE.new_zeros(())
    if execution.balance:
        total = total + execution.balance * router_losses.balance_loss(own, valid_T)
    if execution.z:
        total = total + execution.z * router_losses.z_loss(logits_TE, valid_T)
    return total


def _own_rows(run: Pass, rows: int) -> Iterator[tuple[Segment, slice]]:
    """Each client's segment and its token rows."""
    # Token rows per sequence: every sequence of a pass is padded to one length.
    width = rows // max(max((seg.stop for seg in run.segments), default=0), 1)
    for seg in run.segments:
        yield seg, slice(seg.start * width, seg.stop * width)


def _rows_of(routing: Routing, rows: slice) -> Routing:
    return Routing(routing.probs_TE[rows], routing.weights_TK[rows], routing.experts_TK[rows], routing.kept_TK[rows])
