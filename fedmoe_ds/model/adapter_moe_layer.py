"""Adapter MoE layer: a dense model's frozen feed-forward block, and a pool of adapter experts whose output is added to its.

Legend: B sequences, S positions, T = B * S token rows, D model width, E experts.

    z = W_R x,   T(x) = the k largest of z,   g_m = softmax of z over T(x),   y = FFN(x) + sum_{m in T(x)} g_m E_m(x)

FFT-MoE (arXiv 2508.18663) states the router W_R in R^{M x d}, the experts in the FFN of every block and a personalised number
of active experts; the gating and the parallel placement are our completion. FLAME's rescaler s_i (a method of sparse models)
acts on the sum over the adapter experts, which is all that the pool puts out: y = FFN(x) + s_i sum_m g_m E_m(x).

Where a row uses one expert, g_m is 1 and has no gradient. FedMox (arXiv 2508.16568) routes to one expert; the gate that lets
its router learn, g_m = p_m / stopgrad(p_m) with p the softmax of z over all experts, is our completion (`adapters.moe.gate`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedmoe_ds.kernels.per_client import client_linear
from fedmoe_ds.model.bottleneck_experts import BottleneckExperts
from fedmoe_ds.model.moe_layer import ROUTER, rescaled
from fedmoe_ds.model.pass_context import Execution
from fedmoe_ds.model.routed_forward import record_routing, send_routed
from fedmoe_ds.model.router import route

INNER, OUTER = "experts.inner.weight", "experts.outer.weight"


@dataclass(frozen=True)
class SelectedSoftmax:
    """The routing rule of adapter experts (a `RouterSpec`): softmax over the selected ones, or for a single one
    `straight_through` (`adapters.moe.gate`)."""

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

    def __init__(self, frozen: nn.Module, layer: int, rule: SelectedSoftmax, execution: Execution) -> None:
        super().__init__()
        self.frozen, self.layer, self.rule, self.execution = frozen, layer, rule, execution

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        run, bank = self.execution.running(), self.execution.bank
        # A dense model has no router to freeze, so this one is always in the bank and always trained.
        weight, grad = bank.value(ROUTER, self.layer), bank.grad(ROUTER, self.layer)
        logits_TE = client_linear(hidden_BSD, self.execution.anchor_of(self.layer), weight, grad, run.segments).flatten(0, -2)
        asked, modulation = self.execution.asked(self.layer), self.execution.modulation(self.layer)
        routing = route(logits_TE, self.rule, run.cap_T, run.valid_T, *asked, modulation, self.rule.straight_through)
        record_routing(self.execution, self.layer, routing, logits_TE)
        at_experts = send_routed(self.execution, self.layer, hidden_BSD.flatten(0, -2), routing)
        # The frozen block needs no row of another rank: it is computed while routed rows travel.
        frozen_BSD: Tensor = self.frozen(hidden_BSD)
        y_TD = at_experts(self._experts(hidden_BSD.dtype))
        # The rescaler covers the adapters' sum alone: while V is zero, the layer is the foundation's whatever s_i is.
        return frozen_BSD + rescaled(self.execution, self.layer, y_TD.view_as(hidden_BSD))

    def _experts(self, dtype: torch.dtype) -> BottleneckExperts:
        bank = self.execution.bank
        inner, outer = (bank.value_in(dtype, name, self.layer) for name in (INNER, OUTER))
        return BottleneckExperts(inner, outer, [bank.grad(name, self.layer) for name in (INNER, OUTER)])
