"""Pseudo-gradients: what experts learn from rows that did not use them, out of the gradients of a step that exist anyway.

Legend: L layers, E experts of the model, C client slots of the wave, H home slots, item the shape of one adapter tensor.

In every layer of one client's step, with its mean router probabilities p, its used experts A (those that have rows) and, in
every expert block, the gradients g:

    g_i  <-  g_i + f q_i G,     G = sum_{j in A} p_j g_j / sum_{j in A} p_j
    q_i  =  mean over the step's rows of the router probability of expert i, where the row did not use it       (`tokens`)
    q_i  =  p_i where no row of the step used it, else 0                                                         (`batch`)

f is the client's own (`Assignment.pseudo`); experts that none of its rows may use are given nothing. The experts of a client
lie on all ranks of its cluster: G is an exact sum, which no topology changes. Of gradients that are not finite nothing is
passed on: they show in the client's own values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedmoe_ds.aggregation.exact_sum import EMPTY, ExactSum, spread
from fedmoe_ds.clients.client_view import ClientView
from fedmoe_ds.clients.client_work import ClientWork
from fedmoe_ds.clients.update import Gatherer
from fedmoe_ds.distributed.collectives import all_reduce_largest, all_reduce_sum
from fedmoe_ds.model.dispatcher import Pool


@torch.no_grad()
def add_pseudo_gradients(training: Sequence[tuple[ClientWork, ClientView]], pool: Pool) -> None:
    """Add them to the gradients of the clients that take a step, where they are asked for. Collective over the cluster: every
    rank gives the same clients in the same order."""
    told = [(work, view) for work, view in training if work.assignment.pseudo is not None]
    if not told:
        return
    offers_C3LE = _gathered([work for work, _ in told], told[0][1], pool)
    for work, view in told:
        used_LE, p_LE, missed_LE = offers_C3LE[view.slots[True]].unbind(0)
        asked = work.assignment.pseudo
        assert asked is not None
        q_LE = missed_LE if asked.of == "tokens" else torch.where(used_LE > 0, 0.0, p_LE)
        if (held_LE := work.assignment.held_LE) is not None:
            q_LE = torch.where(torch.from_numpy(held_LE).to(q_LE.device), q_LE, 0.0)
        weight_LE = torch.where(used_LE > 0, p_LE, 0.0)
        # A layer that no row has reached (there is none: every step has rows) would have nothing to pass on.
        weight_LE = weight_LE / weight_LE.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        _add(view, weight_LE, asked.factor * q_LE, pool)


def _gathered(works: Sequence[ClientWork], view: ClientView, pool: Pool) -> Tensor:
    """[C, 3, L, E] float64, on every rank: rows of every expert in the step, its mean router probability, and that of the rows
    which did not use it."""
    layers = next(len(spec.layers) for spec in view.bank.specs.values() if spec.expert)
    device = view.bank.device
    own_H3LE = torch.zeros(pool.home_clients, 3, layers, pool.num_experts, dtype=torch.float64, device=device)
    for work in works:
        # At home; the next step begins anew.
        if work.offered is not None:
            own_H3LE[work.slot], work.offered = work.offered, None
    offers_C3LE = Gatherer(pool, device).home(own_H3LE).to(device)
    # Every row's probabilities sum to one, so their sum is the number of rows.
    rows_CL = offers_C3LE[:, 1].sum(-1).clamp(min=1.0)
    offers_C3LE[:, 1:] /= rows_CL[:, None, :, None]
    return offers_C3LE


def _add(view: ClientView, weight_LE: Tensor, factor_LE: Tensor, pool: Pool) -> None:
    """Add factor times the weighted sum over experts to the gradients of every expert of this rank."""
    specs = [spec for spec in view.blocks() if spec.expert]
    sizes = [2 * math.prod((len(spec.layers), *spec.item)) for spec in specs]
    # In one piece each, for one collective each over all blocks of the client.
    limbs = torch.zeros(sum(sizes), dtype=torch.int64, device=view.bank.device)
    windows = torch.full((sum(len(spec.layers) for spec in specs),), EMPTY, device=view.bank.device)
    parts = zip(specs, torch.split(limbs, sizes), torch.split(windows, [len(spec.layers) for spec in specs]), strict=True)
    sums = [(spec, ExactSum((len(spec.layers), *spec.item), 1, memory, own)) for spec, memory, own in parts]
    for spec, total in sums:
        for expert, grad in enumerate(view.grad(spec).unbind(1)):
            finite_L = grad.flatten(1).isfinite().all(1)
            total.add_product(grad, torch.where(finite_L, weight_LE[:, view.first_expert + expert], 0.0))
    largest = all_reduce_largest(windows.clone(), pool.group, pool.ep_size)
    for (_, total), window in zip(sums, torch.split(largest, [len(spec.layers) for spec in specs]), strict=True):
        total.raise_to(window)
    all_reduce_sum(limbs, pool.group, pool.ep_size)
    for spec, total in sums:
        mean = total.value()
        for expert, grad in enumerate(view.grad(spec).unbind(1)):
            grad.add_((spread(factor_LE[:, view.first_expert + expert], mean) * mean).float())
