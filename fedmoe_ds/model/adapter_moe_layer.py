"""Adapter MoE layer: a dense model's frozen feed-forward block, and a pool of adapter experts whose output is added to its.

Legend: B sequences, S positions, T = B * S token rows, D model width, E experts, Z experts that add nothing, H width of an
expert, N shared experts.

    z = W_R x,   T(x) = the k largest of z,   g_m = softmax of z over T(x),   y = FFN(x) + sum_{m in T(x)} g_m E_m(x)

FFT-MoE (arXiv 2508.18663) states the router W_R in R^{M x d}, the experts in the FFN of every block and a personalised number
of active experts; the gating and the parallel placement are our completion. FLAME's rescaler s_i (a method of sparse models)
acts on the sum over the adapter experts, which is all that the pool puts out: y = FFN(x) + s_i sum_m g_m E_m(x).

Forms of `adapters.moe`, each by itself:

    linear                 E_m(x) = V_m U_m x: LoRA of the experts' width
    shared: N              y = ... + sum_n E_n(x) over N further experts, with weight 1, for every token
    zero: Z                W_R has Z further rows; what is routed there adds nothing, and is sent nowhere
    router_input: sample   z = W_R xbar + w s for all tokens of a sample: xbar is their mean, s its score where data have scores
    gate: straight-through g_m = p_m / stopgrad(p_m), p the softmax of z over all experts, of the one that a row uses

N shared experts of width H are one of width N H, which is dense: it is computed where the token is, while routed rows travel.
Where a row uses one expert, the softmax g_m is 1 and has no gradient. FedMox (arXiv 2508.16568) routes to one expert; the gate
that lets its router learn is our completion.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmoe_ds.config import MoEAdapterConfig
from fedmoe_ds.kernels.per_client import client_linear
from fedmoe_ds.model.bottleneck_experts import BottleneckExperts
from fedmoe_ds.model.moe_layer import ROUTER, rescaled
from fedmoe_ds.model.pass_context import Execution
from fedmoe_ds.model.routed_forward import record_routing, send_routed
from fedmoe_ds.model.router import Routing, route

INNER, OUTER = "experts.inner.weight", "experts.outer.weight"
SHARED_INNER, SHARED_OUTER = "shared_experts.inner.weight", "shared_experts.outer.weight"
ROUTER_SCORE = "router_score.weight"
"""Names of blocks: experts, shared ones [N H, D] and [D, N H], and w [E + Z, 1]."""


@dataclass(frozen=True)
class SelectedSoftmax:
    """The routing rule of adapter experts, those that add nothing among them (a `RouterSpec`): softmax over the selected ones,
    or for a single one `straight_through` (`adapters.moe.gate`)."""

    num_experts: int
    top_k: int
    num_expert_groups: int | None = None
    num_limited_groups: int | None = None
    score_func: str = "softmax"
    # Softmax over all, divided by the sum of the selected ones, is the softmax over the selected logits: g_m of the legend.
    route_norm: bool = True
    route_scale: float = 1.0
    group_score_func: str = "max"
    e_score_correction_bias: Tensor | None = None
    straight_through: bool = False


class AdapterMoELayer(nn.Module):
    """A frozen feed-forward block, to whose output every client's adapter experts are added."""

    def __init__(self, frozen: nn.Module, layer: int, moe: MoEAdapterConfig, execution: Execution) -> None:
        super().__init__()
        self.frozen, self.layer, self.moe, self.execution = frozen, layer, moe, execution
        self.rule = SelectedSoftmax(moe.experts + moe.zero, moe.top_k, straight_through=moe.gate == "straight-through")

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        logits_TE = self._logits(hidden_BSD).flatten(0, -2)
        routing = self._routing(logits_TE)
        record_routing(self.execution, self.layer, routing, logits_TE)
        at_experts = send_routed(self.execution, self.layer, hidden_BSD.flatten(0, -2), routing)
        # Neither the frozen block nor shared experts need a row of another rank: they are computed while routed rows travel.
        frozen_BSD: Tensor = self.frozen(hidden_BSD)
        if self.moe.shared:
            frozen_BSD = frozen_BSD + self._shared(hidden_BSD)
        y_TD = at_experts(self._experts(hidden_BSD.dtype))
        # The rescaler covers the adapters' sum alone: while V is zero, the layer is the foundation's whatever s_i is.
        return frozen_BSD + rescaled(self.execution, self.layer, y_TD.view_as(hidden_BSD))

    def _logits(self, hidden_BSD: Tensor) -> Tensor:
        """Of every token, [B, S, E + Z]."""
        # A dense model has no router to freeze, so this one is always in the bank and always trained.
        if self.moe.router_input == "token":
            return self._product(hidden_BSD, ROUTER)
        run, (samples, positions, _) = self.execution.running(), hidden_BSD.shape
        logits_B1E = self._product(hidden_BSD.mean(1, keepdim=True), ROUTER)
        # The stand-in of an idle rank is nobody's sample, and has no score.
        if ROUTER_SCORE in self.execution.bank and run.segments:
            assert run.scores_T is not None, "data without scores, and a router that sees them"
            score_B11 = run.scores_T.view(samples, positions, 1)[:, :1].to(hidden_BSD.dtype)
            logits_B1E = logits_B1E + self._product(score_B11, ROUTER_SCORE)
        # Equal rows are routed alike, and everything after this knows tokens alone.
        return logits_B1E.expand(-1, positions, -1)

    def _product(self, x_BSI: Tensor, name: str) -> Tensor:
        execution = self.execution
        bank, anchor = execution.bank, execution.anchor_of(self.layer)
        segments = execution.running().segments
        return client_linear(x_BSI, anchor, bank.value(name, self.layer), bank.grad(name, self.layer), segments)

    def _routing(self, logits_TE: Tensor) -> Routing:
        run = self.execution.running()
        allowed_TE, demands, held_softmax = self.execution.asked(self.layer)
        if self.moe.zero and allowed_TE is not None:
            # A mask tells clients the experts that they hold, and of the others there is nothing to hold.
            allowed_TE = F.pad(allowed_TE, (0, self.moe.zero), value=True)
        modulation = self.execution.modulation(self.layer)
        asked = (allowed_TE, demands, held_softmax, modulation)
        routing = route(logits_TE, self.rule, run.cap_T, run.valid_T, *asked, self.rule.straight_through)
        return routing.apart(self.moe.experts) if self.moe.zero else routing

    def _shared(self, hidden_BSD: Tensor) -> Tensor:
        h_BSH = self._product(hidden_BSD, SHARED_INNER)
        return self._product(h_BSH if self.moe.linear else F.gelu(h_BSH), SHARED_OUTER)

    def _experts(self, dtype: torch.dtype) -> BottleneckExperts:
        bank = self.execution.bank
        inner, outer = (bank.value_in(dtype, name, self.layer) for name in (INNER, OUTER))
        return BottleneckExperts(inner, outer, [bank.grad(name, self.layer) for name in (INNER, OUTER)], self.moe.linear)
