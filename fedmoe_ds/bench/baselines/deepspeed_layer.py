"""DeepSpeed layer: `deepspeed.moe.layer.MoE` on the weights, router, adapters, clients and inputs of our layers.

The layer knows one k and one set of adapters, so it runs one client after the other; no token is dropped (`drop_tokens=False`).
It scales the weights of the chosen experts to sum to one, but for k = 1, where it takes the probability itself. Our layers are
told to scale as well (`norm_topk_prob`), so only clients with k = 1 see another factor.

Legend: C clients, T token rows of one client, D model width, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmoe_ds.bench.baselines.layer_stack import FACTORS, Inputs
from fedmoe_ds.bench.harness.workload import Workload
from fedmoe_ds.foundation import HostedLayer


class LoraExpert(nn.Module):
    """One expert with a frozen base, and LoRA on both of its matrices, as a user of DeepSpeed's layer would write it."""

    def __init__(self, width: int, ffn: int, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.w13 = nn.Parameter(torch.empty(2 * ffn, width), requires_grad=False)
        self.w2 = nn.Parameter(torch.empty(width, ffn), requires_grad=False)
        self.a13, self.b13 = nn.Parameter(torch.empty(rank, width)), nn.Parameter(torch.empty(2 * ffn, rank))
        self.a2, self.b2 = nn.Parameter(torch.empty(rank, ffn)), nn.Parameter(torch.empty(width, rank))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = (F.linear(x, self.w13) + self.scale * F.linear(F.linear(x, self.a13), self.b13)).chunk(2, dim=-1)
        activation = F.silu(gate) * up
        return F.linear(activation, self.w2) + self.scale * F.linear(F.linear(activation, self.a2), self.b2)

    def factors(self) -> dict[str, nn.Parameter]:
        return dict(zip(FACTORS, (self.a13, self.b13, self.a2, self.b2), strict=True))


class DeepSpeedStack:
    """DeepSpeed's layers, one client after the other, with that client's k."""

    def __init__(self, hosted: list[HostedLayer], workload: Workload) -> None:
        self.workload, self.inputs = workload, Inputs(workload)
        self.layers = [self._layer(layer) for layer in hosted]
        self.padding = 1.0
        self._first: list[dict[str, tuple[Tensor, Tensor | None]]] = []

    def _layer(self, hosted: HostedLayer) -> Any:
        from deepspeed.moe.layer import MoE

        load, shape = self.workload, self.workload.shape
        template = LoraExpert(shape.hidden, shape.ffn, load.rank, load.alpha / load.rank)
        layer = MoE(
            shape.hidden,
            template,
            shape.experts,
            k=shape.top_k,
            min_capacity=0,
            drop_tokens=False,
            use_rts=False,  # every run chooses the same tokens
            top2_2nd_expert_sampling=False,
        )
        layer.set_deepspeed_parallelism()
        layer.deepspeed_moe.gate.wg.weight = nn.Parameter(hosted.module.router.gate.weight.detach(), requires_grad=False)
        for expert, module in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
            module.w13.data, module.w2.data = hosted.w13[expert], hosted.w2[expert]
            for name, value in module.factors().items():
                head, _, tail = name.partition(".")
                key = f"layers.{hosted.index}.{head}.{expert}.{tail}"
                value.data.copy_(load.initial_value(key, value.shape))
        return layer

    def run(self) -> Tensor:
        """As `OurStack.run`."""
        found: list[Tensor] = []
        computed = routed = 0
        for client, cap in enumerate(self.workload.caps):  # the layer has one k at a time
            for place, layer in enumerate(self.layers):
                layer.zero_grad(set_to_none=True)
                layer.deepspeed_moe.gate.k = cap
                x_TD = self.inputs.x_CTD[client].detach().requires_grad_()
                y_TD, _, counts_E = layer(x_TD)
                y_TD.backward(self.inputs.dy_CTD[client])
                computed += len(counts_E) * int(counts_E.max())
                routed += int(counts_E.sum())
                if place == 0:
                    found.append(y_TD.detach())
                    if client == 0:
                        self._first = [_with_gradients(module) for module in layer.deepspeed_moe.experts.deepspeed_experts]
        self.padding = computed / routed
        return torch.stack(found)

    def gradients(self) -> dict[str, Tensor]:
        """As `OurStack.gradients`."""
        return {name: torch.stack([_gradient(factors[name]) for factors in self._first]) for name in FACTORS}

    def factors_CT(self) -> Tensor:
        """What the rule of this layer multiplies our weights with in the first layer: the probability where k = 1."""
        logits_CTE = F.linear(self.inputs.x_CTD, self.layers[0].deepspeed_moe.gate.wg.weight)
        single_C = torch.tensor(self.workload.caps) == 1
        return torch.where(single_C.unsqueeze(1), logits_CTE.softmax(-1).amax(-1), 1.0)


def _with_gradients(expert: LoraExpert) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Held on to: the next client's gradients are new tensors."""
    return {name: (value, value.grad) for name, value in expert.factors().items()}


def _gradient(factor: tuple[Tensor, Tensor | None]) -> Tensor:
    """Zeros for an expert without rows in a system that skips it."""
    value, grad = factor
    return torch.zeros_like(value) if grad is None else grad
