"""MoE layer, in the place of a hosted MoE block: DeepSpeed's expert shard, our routing, dispatch and adapters.

Legend: B sequences, S positions, T = B * S token rows, D model width, E experts, C client slots.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fedmoe_ds.foundation import autoep
from fedmoe_ds.foundation.pre_gate import PreGate
from fedmoe_ds.kernels.frozen_layers import frozen_product
from fedmoe_ds.kernels.per_client import client_linear, client_scale
from fedmoe_ds.model import experts
from fedmoe_ds.model.pass_context import Execution, Pass
from fedmoe_ds.model.pre_gated import layer_overlaps, unit_gates
from fedmoe_ds.model.routed_forward import record_routing, send_routed
from fedmoe_ds.model.router import Routing, route

GATE_UP_A, GATE_UP_B = "experts.gate_up.lora_A", "experts.gate_up.lora_B"
DOWN_A, DOWN_B = "experts.down.lora_A", "experts.down.lora_B"
GATE_UP, DOWN = "experts.gate_up.weight", "experts.down.weight"
ROUTER, RESCALER = "router.weight", "rescaler"
"""Names of the blocks of a trained router, and of the learnable factor on a client's expert output."""


class FederatedMoELayer(nn.Module):
    """A hosted MoE layer that serves the clients of the running pass."""

    def __init__(self, hosted: autoep.HostedLayer, execution: Execution, gate: PreGate | None = None) -> None:
        super().__init__()
        # In a list: the model's own router is no part of a layer, which would double it in every state dict.
        self.gates = [gate] if gate is not None else []
        self.host = hosted.module
        self.layer = hosted.index
        self.w13_EFD, self.w2_EDF = hosted.w13, hosted.w2
        self.unit = hosted.unit
        self.execution = execution

    def forward(self, hidden_BSD: Tensor) -> Any:
        run = self.execution.running()
        x_TD = hidden_BSD.flatten(0, -2)
        # [B, S, D] goes in, not [T, D]: a trained router is per client, and clients are cut by sequences.
        logits_TE = self._logits(hidden_BSD, run).flatten(0, -2)
        asked, modulation = self.execution.asked(self.layer), self.execution.modulation(self.layer)
        routing = route(logits_TE, self.host.router, run.cap_T, run.valid_T, *asked, modulation)
        if run.gate_TE is not None:
            routing = self._pre_gated(routing, x_TD)
        # Before the experts run: it stores which of them the method lets this batch train.
        record_routing(self.execution, self.layer, routing, logits_TE)
        at_experts = send_routed(self.execution, self.layer, x_TD, routing)
        # Shared experts are on every rank and need no row of another: they are computed while routed rows travel.
        shared = autoep.shared_output(self.host, x_TD, hidden_BSD)
        y_TD = at_experts(self._experts(x_TD.dtype))
        y_BSD = rescaled(self.execution, self.layer, y_TD.view_as(hidden_BSD))
        # They are added after the rescaler: s_i stands before the sum over routed experts alone.
        return autoep.finalize_output(self.host, y_BSD, shared)

    def _pre_gated(self, routing: Routing, x_TD: Tensor) -> Routing:
        if not self.execution.wave.overlaps:
            return unit_gates(routing)
        place = self.execution.layers.index(self.layer)
        return replace(unit_gates(routing), overlap_TE=layer_overlaps(self.gates[0], place, x_TD))

    def _logits(self, hidden_BSD: Tensor, run: Pass) -> Tensor:
        if run.gate_TE is not None:
            return run.gate_TE.view(*hidden_BSD.shape[:-1], -1)
        bank, gate = self.execution.bank, self.host.router.gate
        if ROUTER not in bank:
            # transformers keeps some families' routers in float32 in a bfloat16 model (DeepSeek since 5.24).
            logits = frozen_product(hidden_BSD.to(gate.weight.dtype), gate.weight)
            return logits if gate.bias is None else logits + gate.bias
        weight, grad = bank.value(ROUTER, self.layer), bank.grad(ROUTER, self.layer)
        logits = client_linear(hidden_BSD, self.execution.anchor_of(self.layer), weight, grad, run.segments)
        return logits if gate.bias is None else logits + gate.bias

    def _experts(self, dtype: torch.dtype) -> experts.Experts:
        bank = self.execution.bank
        if GATE_UP in bank:
            # Full fine-tuning: every client has a copy of its own in the bank, and the hosted weights only gave it its start.
            w13, w2 = (bank.value(name, self.layer) for name in (GATE_UP, DOWN))
            return experts.OwnExperts(w13, w2, [bank.grad(name, self.layer) for name in (GATE_UP, DOWN)], self.unit)
        return experts.FrozenExperts(self.w13_EFD, self.w2_EDF, self._lora(dtype), self.unit)

    def _lora(self, dtype: torch.dtype) -> experts.Lora | None:
        bank = self.execution.bank
        if GATE_UP_A not in bank:
            return None
        names = (GATE_UP_A, GATE_UP_B, DOWN_A, DOWN_B)
        a13, b13, a2, b2 = (bank.value_in(dtype, name, self.layer) for name in names)
        grads = [bank.grad(name, self.layer) for name in names]
        products = self.execution.products_for(a13.shape[2], dtype, self.w13_EFD.device)
        return experts.Lora(a13, b13, a2, b2, grads, self.execution.scale, products, self.execution.wave.wave_factors)


def rescaled(execution: Execution, layer: int, y_BSD: Tensor) -> Tensor:
    """FLAME 1.4: h_i = s_i * sum_j R_i(x, k_i)^j (...): the factor covers all that the experts put out, adapters included."""
    run, bank = execution.running(), execution.bank
    if execution.rescaler:
        scale, grad = bank.value(RESCALER, layer), bank.grad(RESCALER, layer)
        y_BSD = client_scale(y_BSD, execution.anchor_of(layer), scale, grad, run.segments)
    if run.rescale_C is None or not run.segments:  # the stand-in row of an idle rank belongs to no client
        return y_BSD
    # Segments are contiguous and cover the pass, so joining them gives the rows back in order.
    parts = [y_BSD[seg.start : seg.stop] * run.rescale_C[seg.slot] for seg in run.segments]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
