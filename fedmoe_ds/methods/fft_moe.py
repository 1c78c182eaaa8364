"""FFT-MoE: sparse mixture-of-experts adapters in place of LoRA (Hu, Teng, Wu, Wang; arXiv 2508.18663).

Legend: T token rows of one batch, L layers, E = M experts.

Stated by the paper: a frozen dense foundation; in the feed-forward block of every layer M experts, each a two-layer network,
and a router W_R in R^{M x d}; every client activates as many experts as its budget allows; experts and router are averaged with
weights |D_n| / |D|; an auxiliary loss that dynamically regularises routing, for diversity and balanced use under device and
data heterogeneity. Its formula is not public. What stands here is ours, selectable by `auxiliary`:

    switch      L = lambda_0 L_bal,   L_bal = M sum_m f_m P_m        f_m share of routed slots, P_m mean router probability
    adaptive    L = lambda_n L_bal,   lambda_n = lambda_0 (1 + CV(f)) (k_max / k_n)^gamma
                stronger where a client's data use the experts unevenly, and where its device affords few of them
    global      L = lambda_0 KL(P || q),   q_m proportional to max(0, 1 / M - u_m) + epsilon / M
                u is the share of slots that expert m served over all clients in the last round, sent with the model: pulls
                routing towards globally under-used experts; in the first round q is uniform
    none        no auxiliary loss

All participants count in every expert, as the paper says; one that routed no row to an expert sends back what it received.

Further completions: gating is a softmax over the selected experts, the adapters' sum is added to the block's output
(`fedmoe_ds.model.adapter_moe_layer`), the largest budget activates `adapters.moe.top_k` experts. The loss is the mean over
layers; f, P and CV(f) are those of a whole local step, so these losses and micro-batches exclude each other.
"""

from __future__ import annotations

from functools import cache, partial
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedmoe_ds.methods import (
    Assignment,
    Client,
    Config,
    Method,
    MethodInfo,
    MethodParams,
    RoundContext,
    Routing,
    RoutingObserver,
    UserError,
    balance_loss,
    upload,
)


class FFTMoEParams(MethodParams):
    """The auxiliary loss."""

    auxiliary: Literal["none", "switch", "adaptive", "global"] = "adaptive"
    coefficient: float = Field(1e-2, ge=0, description="lambda_0")
    gamma: float = Field(0.5, ge=0, description="adaptive: exponent of k_max / k_n")
    # Above zero: KL(P || q) is infinite where q is zero and P is not.
    epsilon: float = Field(0.05, gt=0, description="global: floor of the target, as a share of 1 / M")

    def idle(self, config: Config) -> dict[str, str]:
        why = f"with method.auxiliary={self.auxiliary}"
        found = {key: why for key, kind in (("gamma", "adaptive"), ("epsilon", "global")) if self.auxiliary != kind}
        if self.auxiliary == "none":
            return found | {"coefficient": why}
        return found if self.coefficient else dict.fromkeys(("gamma", "epsilon"), "with method.coefficient=0")


class FFTMoE(Method):
    """Adapter experts on a dense model."""

    Params: ClassVar[type[MethodParams]] = FFTMoEParams
    info = MethodInfo(
        title="FFT-MoE",
        paper="arXiv 2508.18663",
        adapts="active adapter experts k",
        trains="adapter experts, router (dense foundation)",
        sends="experts, router",
        weighs="data size",
        completion="gating, placement, auxiliary loss",
    )

    def __init__(self, params: FFTMoEParams) -> None:
        super().__init__(params)
        # f, P and CV(f) are no means over rows, so micro-batches would add up to another loss.
        self.whole_steps = params.auxiliary != "none" and params.coefficient > 0

    def check_config(self, config: Config) -> None:
        if config.adapters.moe is None:
            raise UserError(
                "adapters.moe: null: FFT-MoE trains adapter experts beside a dense foundation; add the section, for instance "
                "adapters.moe={experts: 8, top_k: 4}"
            )
        if self.params.auxiliary == "global" and self.params.coefficient and config.privacy.clip is not None:
            raise UserError(
                "method.auxiliary: global: its targets are counts of all clients' tokens, which noise does not cover "
                "(privacy.clip); use another one"
            )
        if self.params.auxiliary == "global" and config.adapters.moe.zero:
            raise UserError(
                f"adapters.moe.zero: {config.adapters.moe.zero}: method.auxiliary=global has a target for experts that are "
                "used, and none for these; use 0, or switch or adaptive"
            )

    def observer(self, client: Client, assignment: Assignment, context: RoundContext) -> RoutingObserver | None:
        # Layers are called by the model's own indices; targets are rows of the layers that have experts.
        weight, place = self.params.coefficient, {layer: row for row, layer in enumerate(self.facts.layers)}
        if self.params.auxiliary == "none" or weight == 0:
            return None
        if self.params.auxiliary == "global":
            # Sent to the device once, not by every layer of every batch.
            sent = cache(partial(upload, [self.targets(context.utilisation_LE).numpy()]))
            return RoutingObserver(
                loss=lambda layer, own, *_: weight * divergence(own, None, sent(own.probs_TE.device)[0][place[layer]])
            )
        if self.params.auxiliary == "switch":
            return RoutingObserver(loss=lambda layer, own, *_: weight * balance_loss(own))
        # The same for the whole round; CV(f) is taken from every batch.
        device = (self.facts.top_k / assignment.cap) ** self.params.gamma
        return RoutingObserver(
            loss=lambda layer, own, *_: (weight * device * (1.0 + unevenness(own))).float() * balance_loss(own)
        )

    def targets(self, utilisation_LE: np.ndarray | None) -> Tensor:
        """q [L, E] float32, rows sum to one: the global target of every layer."""
        shape = (len(self.facts.layers), self.facts.num_experts)
        even = 1.0 / shape[1]
        if utilisation_LE is None:
            return torch.full(shape, even)
        # A layer that nobody used in the last round has a sum of zero; its share is then zero everywhere and q uniform.
        share_LE = utilisation_LE / np.maximum(utilisation_LE.sum(1, keepdims=True), 1)
        target_LE = np.maximum(even - share_LE, 0.0) + self.params.epsilon * even
        return torch.from_numpy(target_LE / target_LE.sum(1, keepdims=True)).float()


def unevenness(own: Routing) -> Tensor:
    """CV(f), float64 []: standard deviation over mean of the shares of routed slots; 0 where use is even."""
    # Kept slots, as in the balance loss; integers, so no gradient reaches the router through lambda_n.
    counts_E = own.counts_E().double()
    # The population's deviation: all experts are there, they are no sample. Without any slot both are zero.
    return torch.where(counts_E.any(), counts_E.std(correction=0) / counts_E.mean(), 0.0)


def divergence(own: Routing, valid_T: Tensor | None, target_E: Tensor) -> Tensor:
    """KL(P || q) of the mean router probability P from the target q; 0 for a batch without rows. None: all rows are valid."""
    probs_TE = own.probs_TE if valid_T is None else own.probs_TE[valid_T]
    if not len(probs_TE):
        # Times zero, so that backward has a path where there is nothing to learn from.
        return own.probs_TE.sum() * 0.0
    mean_E = probs_TE.mean(0)
    # xlogy: 0 log 0 is 0, where softmax has underflowed.
    return torch.xlogy(mean_E, mean_E / target_E.to(mean_E.device)).sum()
