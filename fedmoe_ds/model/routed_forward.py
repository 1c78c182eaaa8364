"""Routed forward: what every layer with an expert pool does with its routing, whatever its experts are.

Legend: B sequences, S positions, T = B * S token rows, D model width, E experts, C client slots.

`record_routing` counts activations, asks the method what it wants to see and collects auxiliary losses; `send_routed` sends the
rows through the pool. Where a method lets a batch train only some experts, the rows of the others go through the pool
without autograd: nothing of them is kept for the backward pass, and neither their adapters, nor their inputs, nor the router
get a gradient through them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fedmoe_ds.model import router_losses
from fedmoe_ds.model.dispatcher import make_plan
from fedmoe_ds.model.expert_pass import expert_pass, send_to_experts
from fedmoe_ds.model.experts import Experts
from fedmoe_ds.model.pass_context import Execution, Pass
from fedmoe_ds.model.router import Routing


def send_routed(execution: Execution, layer: int, x_TD: Tensor, routing: Routing) -> Callable[[Experts], Tensor]:
    """Set every row out for its experts. `record_routing` must have seen this routing.

    Returns what gives sum_j p_tj E_j(x_t) for every row, [T, D]; what is computed before it is called is computed while the
    rows travel.
    """
    run = execution.running()
    active_TK = _active_slots(execution, layer, routing)
    if active_TK is None:
        plan = make_plan(routing, run.slot_T, run.slot, execution.pool)
        return send_to_experts(x_TD, routing, execution.anchor_of(layer), plan, execution.pool)
    return _send_in_parts(execution, layer, x_TD, routing, active_TK)


def _send_in_parts(
    execution: Execution, layer: int, x_TD: Tensor, routing: Routing, active_TK: Tensor
) -> Callable[[Experts], Tensor]:
    """As `send_routed`, where only the active slots take part in the backward pass."""
    run, anchor = execution.running(), execution.anchor_of(layer)
    # The two masks part the kept slots: every routed row is computed once, with autograd or without. How many are in the first
    # depends on the scores, and is what the host has to wait for; the second has the rest.
    first = replace(routing, kept_TK=routing.kept_TK & active_TK, kept=None)
    plan = make_plan(first, run.slot_T, run.slot, execution.pool)
    rest = None if routing.kept is None else routing.kept - len(plan.slots_N)
    held_back = replace(routing, kept_TK=routing.kept_TK & ~active_TK, kept=rest)
    at_experts = send_to_experts(x_TD, first, anchor, plan, execution.pool)

    def at_both(experts: Experts) -> Tensor:
        y_TD = at_experts(experts)
        with torch.no_grad():
            # Nothing is saved here, so held-back rows cost no memory for the backward pass and no product in it.
            plan = make_plan(held_back, run.slot_T, run.slot, execution.pool)
            held_TD = expert_pass(x_TD, held_back, anchor, plan, execution.pool, experts)
        return y_TD + held_TD

    return at_both


def record_routing(execution: Execution, layer: int, routing: Routing, logits_TE: Tensor) -> None:
    """Write counts, observations and auxiliary losses of a layer. Overwrites: a recomputed layer counts once."""
    run = execution.running()
    run.counts[layer] = _count(execution, run, routing, routing.kept_TK)
    if execution.wave.objectives:
        run.routed[layer] = routing.detached()
    found_losses: dict[int, Tensor] = {}
    # Emptied, not added to: activation checkpointing runs the layer a second time in the backward pass.
    run.observed[layer] = {}
    for at, seg in enumerate(run.segments):
        observer = execution.wave.observers.get(seg.slot)
        asked_for = seg.slot in execution.wave.offers
        if observer is None and not (execution.balance or execution.z or asked_for):
            continue
        own, valid_T, own_TE = _without_padding(run, at, routing, logits_TE)
        if asked_for:
            run.offered.setdefault(layer, {})[seg.slot] = offered(own)
        if observer is not None and observer.observe is not None:
            with torch.no_grad():
                active_E, sums = observer.observe(own, valid_T)
            run.observed[layer][seg.slot] = sums if active_E is None else {**sums, ACTIVE: active_E}
        if observer is not None and observer.attended is not None:
            attention_T = run.attended[layer][run.places(len(logits_TE))[at]]
            with torch.no_grad():
                sums = observer.attended(own, attention_T)
            run.observed[layer][seg.slot] = run.observed[layer].get(seg.slot, {}) | sums
        loss = _auxiliary(execution, own, own_TE)
        if observer is not None and observer.loss is not None:
            # With autograd, unlike `observe`: the method's loss trains the router (and, through the logits, what lies below).
            loss = _added(loss, observer.loss(layer, own, own_TE, valid_T))
        if observer is not None and observer.scored is not None:
            assert run.scores_T is not None, "a method that asks for scores has refused data without them"
            loss = _added(loss, observer.scored(own, run.scores_T[run.places(len(logits_TE))[at]]))
        if loss is not None:
            found_losses[seg.slot] = loss
    # No entry for a layer without losses: the mean over layers looks up every client in each entry.
    if found_losses:
        run.losses[layer] = found_losses


def _added(loss: Tensor | None, further: Tensor | None) -> Tensor | None:
    return further if loss is None else (loss if further is None else loss + further)


@torch.no_grad()
def offered(own: Routing) -> Tensor:
    """[2, E] float64: router probability of every expert, summed over a client's rows, and over those that did not use it."""
    # Sigmoid routers' scores do not sum to one; the epsilon is for rows of which all scores are zero.
    whole_T1 = own.with_zeros()[0].sum(-1, keepdim=True)
    score_TE = (own.probs_TE / (whole_T1 + 1e-20)).double()
    used_TE = torch.zeros_like(score_TE, dtype=torch.bool).scatter_(1, own.experts_TK, own.kept_TK)
    return torch.stack([score_TE.sum(0), (score_TE * ~used_TE).sum(0)])


ACTIVE = "active"
"""Where a pass keeps the mask of the experts that it trains, among the observations."""


def _active_slots(execution: Execution, layer: int, routing: Routing) -> Tensor | None:
    """[T, K] bool: routed slots that take part in the backward pass; None for all of them."""
    run = execution.running()
    # Every rank of the cluster must take the same number of trips, whether or not it has rows in this pass.
    if not execution.wave.selective:
        return None
    masks = {slot: sums[ACTIVE] for slot, sums in run.observed[layer].items() if ACTIVE in sums}
    for slot, trained_LE in execution.wave.trained.items():
        trained_E = trained_LE[execution.layers.index(layer)]
        masks[slot] = masks[slot] & trained_E if slot in masks else trained_E
    # Clients for whom nobody names experts train all that they are routed to.
    active_TK = torch.ones_like(routing.kept_TK)
    for seg, rows in zip(run.segments, run.spans(routing.kept_TK.shape[0]), strict=True):
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
    # Adding zeros for the others: to pick the slots by their mask, the host would have to know how many there are.
    counts = key_TK.new_zeros(home * experts).scatter_add_(0, key_TK.flatten(), slots_TK.flatten().long())
    return counts.view(home, experts)


def _auxiliary(execution: Execution, own: Routing, logits_TE: Tensor) -> Tensor | None:
    if not (execution.balance or execution.z):
        return None
    total = logits_TE.new_zeros(())
    if execution.balance:
        total = total + execution.balance * router_losses.balance_loss(own)
    if execution.z:
        total = total + execution.z * router_losses.z_loss(logits_TE)
    return total


def _without_padding(run: Pass, at: int, routing: Routing, logits_TE: Tensor) -> tuple[Routing, Tensor, Tensor]:
    """A segment's routing, validity (True for all) and logits."""
    places = run.places(len(logits_TE))[at]
    if isinstance(places, slice):
        return routing.rows(places), run.valid_T[places], logits_TE[places]
    return routing.rows(places), run.valid_T.index_select(0, places), logits_TE.index_select(0, places)
