"""The layer that takes the place of a hosted MoE block: DeepSpeed's expert shard, our routing, dispatch and adapters.

Legend: B sequences, S positions, T = B * S token rows, D model width, E experts, C client slots.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmoe_ds.adapters.segmented import Segment, client_linear, client_scale
from fedmoe_ds.experts import ffn, losses
from fedmoe_ds.experts.dispatch import expert_pass, make_plan
from fedmoe_ds.experts.execution import Execution, Pass
from fedmoe_ds.experts.router import Routing, route
from fedmoe_ds.foundation import hosting

GATE_UP_A, GATE_UP_B = "experts.gate_up.lora_A", "experts.gate_up.lora_B"
DOWN_A, DOWN_B = "experts.down.lora_A", "experts.down.lora_B"
ROUTER, RESCALER = "router.weight", "rescaler"


class FederatedMoELayer(nn.Module):
    """A hosted MoE layer that serves the clients of the running pass."""

    def __init__(self, hosted: hosting.HostedLayer, execution: Execution) -> None:
        super().__init__()
        self.host = hosted.module
        self.layer = hosted.index
        self.w13_EFD, self.w2_EDF = hosted.w13, hosted.w2
        self.execution = execution

    def forward(self, hidden_BSD: Tensor) -> Any:
        run = self.execution.running()
        x_TD = hidden_BSD.flatten(0, -2)
        logits_TE = self._logits(hidden_BSD, run).flatten(0, -2)
        routing = route(logits_TE, self.host.router, run.cap_T, run.valid_T, run.allowed_TE)
        self._observe(routing, logits_TE, run)
        plan = make_plan(routing, run.slot_T, run.slot, self.execution.pool)
        anchor = self.execution.anchor
        y_TD = expert_pass(x_TD, routing, anchor, plan, self.execution.pool, self.w13_EFD, self.w2_EDF, self._lora())
        y_BSD = self._rescale(y_TD.view_as(hidden_BSD), run)
        return hosting.finalize_output(self.host, y_BSD, x_TD, hidden_BSD)

    def _logits(self, hidden_BSD: Tensor, run: Pass) -> Tensor:
        bank, gate = self.execution.bank, self.host.router.gate
        if ROUTER not in bank:
            return F.linear(hidden_BSD, gate.weight, gate.bias)
        weight, grad = bank.value(ROUTER, self.layer), bank.grad(ROUTER, self.layer)
        logits = client_linear(hidden_BSD, self.execution.anchor, weight, grad, run.segments)
        return logits if gate.bias is None else logits + gate.bias

    def _lora(self) -> ffn.Lora | None:
        bank = self.execution.bank
        if GATE_UP_A not in bank:
            return None
        names = (GATE_UP_A, GATE_UP_B, DOWN_A, DOWN_B)
        a13, b13, a2, b2 = (bank.value(name, self.layer) for name in names)
        grads = [bank.grad(name, self.layer) for name in names]
        products = self.execution.products_for(a13.shape[2], self.w13_EFD.dtype, self.w13_EFD.device)
        return ffn.Lora(a13, b13, a2, b2, grads, self.execution.scale, products)

    def _rescale(self, y_BSD: Tensor, run: Pass) -> Tensor:
        """FLAME 1.4: h_i = s_i * sum_j R_i(x, k_i)^j (...): the factor covers the base output as well as the adapters."""
        bank = self.execution.bank
        if self.execution.rescaler:
            scale, grad = bank.value(RESCALER, self.layer), bank.grad(RESCALER, self.layer)
            y_BSD = client_scale(y_BSD, self.execution.anchor, scale, grad, run.segments)
        if run.rescale_C is None:
            return y_BSD
        parts = [y_BSD[seg.start : seg.stop] * run.rescale_C[seg.slot] for seg in run.segments]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _observe(self, routing: Routing, logits_TE: Tensor, run: Pass) -> None:
        """Count activations and collect auxiliary losses, client by client. Overwrites: a recomputed layer counts once."""
        experts, width = self.execution.pool.num_experts, logits_TE.shape[0] // max(_sequences(run.segments), 1)
        home = self.execution.pool.home_clients
        with torch.no_grad():
            key = run.slot_T.unsqueeze(-1) * experts + routing.experts_TK
            run.counts[self.layer] = torch.bincount(key[routing.kept_TK], minlength=home * experts).view(home, experts)
        if not (self.execution.balance or self.execution.z):
            return
        found = {}
        for seg in run.segments:
            rows = slice(seg.start * width, seg.stop * width)
            found[seg.slot] = self._auxiliary(routing, logits_TE[rows], run.valid_T[rows], rows)
        run.losses[self.layer] = found

    def _auxiliary(self, routing: Routing, logits_TE: Tensor, valid_T: Tensor, rows: slice) -> Tensor:
        own = Routing(routing.probs_TE[rows], routing.weights_TK[rows], routing.experts_TK[rows], routing.kept_TK[rows])
        total = logits_TE.new_zeros(())
        if self.execution.balance:
            total = total + self.execution.balance * losses.balance_loss(own, valid_T)
        if self.execution.z:
            total = total + self.execution.z * losses.z_loss(logits_TE, valid_T)
        return total


def _sequences(segments: list[Segment]) -> int:
    return max((seg.stop for seg in segments), default=0)
