"""Mixture of Ranks (MoR): rank-1 adapters as experts, chosen by how degraded a sample is (arXiv 2511.16024).

Legend: T token rows, E = M experts, Z experts that add nothing.

READ (a public reading of the AAAI 2026 paper; no public code was found). Super-resolution of real images by a diffusion model
in one step. Every adapter of it is cut into ranks, of which some are shared and the others are the experts of a mixture:

    y = W0 x + sum_{i in T(s)} g_i(s) B_i A_i x + sum_{j shared} B_j A_j x,     every A_i and B_i of rank 1
    L = N sum_i alpha_i f_i p_i,     alpha_i = alpha, and s alpha for an expert that adds nothing

40 ranks are 8 shared and 32 routed, of which 8 are active; some of the slots belong to zero experts, which add nothing and cost
nothing. s in [0, 1] says how degraded the image is: s_i = exp(d_n) / (exp(d_p) + exp(d_n)), from CLIP's similarities to pairs
of prompts for good and bad images. f_i is the share of routed slots that expert i was given, p_i its mean probability. So a
zero expert's slots cost little in the balance of a clean image and all of it in that of a degraded one: degraded images use
more ranks. The paper has no federation.

COMPLETION. Neither super-resolution nor CLIP is within reach here. The mechanism is kept, and fed with a known degradation:
images that are blurred and noisy by a severity s (`data.form.kind: degraded`), in a classifier.
- Its ranks are the adapter experts of `adapters.moe` beside every feed-forward block: `linear: true`, `width: 1`, `shared: 8`,
  `experts` and `zero`; the 32 routed slots are 24 ranks and 8 zero experts. Their LoRA scale is 1.
- The router's formula was not found: z = W xbar + w s, with xbar the mean of a sample's tokens, one decision per sample and
  layer (`router_input: sample`); gates are a softmax over the chosen, zero experts among them (`adapter_moe_layer.py`).
- Of samples of unequal s, p_i is the mean of s p_i over the rows of a local step: with s = 1 for all this is the Switch loss
  over all experts, with s = 0 zero experts cost nothing. N counts them. The loss is the mean over layers.
- alpha was not found; 0.01 is Switch's. `balance: switch` and `none` are the ablations.
- FedAvg by data size. A client's budget is its number of active slots, `federation.tiers.N.top_k`; clients differ in how
  degraded their images are (`data.form.skew`), and in nothing else that the method would ask for.
With `width: 4` and a fourth of the experts, these are mixtures of whole LoRA adapters of the same parameters.

Limits. What the paper's s is learnt to see is given here. A score is a number of the data, so an image without one is refused,
and so is text: a mean over tokens has those that are to be predicted.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Literal

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
)


class MoRParams(MethodParams):
    """The loss that says what slots are worth."""

    balance: Literal["degradation", "switch", "none"] = Field(
        "degradation", description="what a zero expert's slot costs: by the sample's score, as any other, or no balance at all"
    )
    alpha: float = Field(1e-2, ge=0, description="weight of the balance")

    def idle(self, config: Config) -> dict[str, str]:
        return {"alpha": "with method.balance=none"} if self.balance == "none" else {}


class MoR(Method):
    """Ranks as experts, and a balance between them that degradation decides."""

    Params: ClassVar[type[MethodParams]] = MoRParams
    info = MethodInfo(
        title="Mixture of Ranks",
        paper="arXiv 2511.16024",
        adapts="active ranks k, zero experts among them",
        trains="rank-1 adapter experts, shared ranks, router (dense foundation)",
        sends="all of them",
        weighs="data size",
        completion="federation; a known severity in the place of CLIP's; router, gates, alpha",
    )

    def __init__(self, params: MoRParams) -> None:
        super().__init__(params)
        # f and p are no means over rows, as in FFT-MoE.
        self.whole_steps = params.balance != "none" and params.alpha > 0
        self.scored = params.balance == "degradation" and params.alpha > 0

    def check_config(self, config: Config) -> None:
        moe = config.adapters.moe
        if moe is None:
            raise UserError(
                "adapters.moe: null: ranks of MoR are adapter experts beside a dense foundation; add the section, for instance "
                "adapters.moe={linear: true, width: 1, experts: 24, shared: 8, zero: 8, top_k: 8, router_input: sample}"
            )
        if not moe.linear:
            raise UserError("adapters.moe.linear: false: ranks of MoR are LoRA matrices, without an activation; use true")

    def observer(self, client: Client, assignment: Assignment, context: RoundContext) -> RoutingObserver | None:
        if self.scored:
            return RoutingObserver(scored=partial(_degradation_balance, self.params.alpha))
        if not self.whole_steps:
            return None
        return RoutingObserver(loss=lambda layer, own, *_: self.params.alpha * balance_loss(own))


def _degradation_balance(alpha: float, own: Routing, scores_T: Tensor) -> Tensor:
    """alpha N sum_i f_i p_i, in whose p the rows of zero experts count as much as their samples are degraded."""
    if own.zeros is None:
        return alpha * balance_loss(own)
    price_TE, price_TZ = torch.ones_like(own.probs_TE), scores_T.unsqueeze(1).expand_as(own.zeros.probs_TZ)
    return alpha * balance_loss(own, price_TE=torch.cat([price_TE, price_TZ], dim=1))
