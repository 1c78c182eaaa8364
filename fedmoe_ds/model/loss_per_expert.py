"""Loss per expert: which negative log-likelihood the targets had whose tokens an expert served, in every layer.

Legend: N targets, L layers with experts, K top-k, E experts.
"""

from __future__ import annotations

import torch

from fedmoe_ds.model.objective import Objective, Sums, Targets

EXPERT_LOSS, EXPERT_TARGETS = "loss_per_expert", "targets_per_expert"
"""Sums [L, E] over a client's local training: negative log-likelihoods of the targets of an expert, and how many these are."""


def loss_per_expert(experts: int) -> Objective:
    """Cross-entropy, unchanged to the bit, with these two sums.

    A target is an expert's where the token that predicts it (of an image, the class token) was routed to it in that layer, so
    it counts for as many experts as its token uses.
    """

    def observe(targets: Targets) -> Sums:
        nll_N1, routing = targets.nll_N.double().unsqueeze(1), targets.routing
        losses, counts = [], []
        for experts_NK, kept_NK in zip(routing.experts_LNK, routing.kept_LNK, strict=True):
            # A column per expert, added up along the targets in one fixed order; adding at indices has none on a GPU.
            served_NE = nll_N1.new_zeros(len(experts_NK), experts).scatter_(1, experts_NK, kept_NK.double())
            losses.append((served_NE * nll_N1).sum(0))
            counts.append(served_NE.sum(0))
        return {EXPERT_LOSS: torch.stack(losses), EXPERT_TARGETS: torch.stack(counts)}

    return Objective(observe=observe)
