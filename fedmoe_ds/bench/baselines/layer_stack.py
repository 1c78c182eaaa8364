"""Layer stack: the expert layers of a model alone, one beside the other, with the clients and adapters of the workload.

Legend: C clients, T token rows of one client, D model width, E experts.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from fedmoe_ds.bench.harness.workload import Workload
from fedmoe_ds.config import AdapterConfig
from fedmoe_ds.distributed.runtime import keep_freed_memory
from fedmoe_ds.foundation import HostedLayer
from fedmoe_ds.model.adapter_bank import Bank
from fedmoe_ds.model.batch import Rows, make_batch
from fedmoe_ds.model.dispatcher import Pool
from fedmoe_ds.model.expert_layout import hosted_layout
from fedmoe_ds.model.install import adapter_blocks
from fedmoe_ds.model.moe_layer import DOWN_A, DOWN_B, GATE_UP_A, GATE_UP_B, FederatedMoELayer
from fedmoe_ds.model.pass_context import Execution, Pass
from fedmoe_ds.randomness import torch_generator

FACTORS = (GATE_UP_A, GATE_UP_B, DOWN_A, DOWN_B)


class Inputs:
    """Hidden states and the gradients of the outputs, [C, T, D], drawn from addresses."""

    def __init__(self, workload: Workload) -> None:
        shape = (len(workload.caps), workload.sequences * workload.length, workload.shape.hidden)
        self.x_CTD, self.dy_CTD = (
            torch.empty(shape).normal_(generator=torch_generator(workload.seed, "bench-layers", name)) for name in ("x", "dy")
        )


class OurStack:
    """Our layers: all clients in one pass."""

    padding = 1.0

    def __init__(self, model: nn.Module, hosted: list[HostedLayer], workload: Workload) -> None:
        keep_freed_memory()  # as every training run does
        self.inputs = Inputs(workload)
        clients, experts = len(workload.caps), workload.shape.experts
        adapters = AdapterConfig(rank=workload.rank, alpha=workload.alpha, attention=[])
        self.bank = Bank(adapter_blocks(model, hosted_layout(hosted), adapters, rescaler=None), experts, clients)
        for slot in range(clients):
            for key, _, value in self.bank.items(0, slot):
                value.copy_(workload.initial_value(key, value.shape))
        pool = Pool(None, 1, experts, clients, merge=True)
        self.execution = Execution(self.bank, pool, workload.alpha / workload.rank)
        self.layers = [FederatedMoELayer(layer, self.execution) for layer in hosted]
        length = self.inputs.x_CTD.shape[1]
        ids, mask = np.zeros(length, dtype=np.int64), np.zeros(length, dtype=bool)  # the layers never see them
        rows = [Rows(slot, cap, [ids], [mask]) for slot, cap in enumerate(workload.caps)]
        self.batch = make_batch(rows, torch.device("cpu"))

    def run(self) -> Tensor:
        """Forward and backward of all layers for all clients; the first layer's output, [C, T, D].

        Each layer has its own pass over the same input, which needs a gradient as inside a model.
        """
        self.bank.zero_grad()
        batch = self.batch
        self.execution.current = Pass(batch.segments, None, batch.slot_T, batch.cap_T, batch.valid_T)
        outputs = [self._through(layer) for layer in self.layers]
        return outputs[0]

    def _through(self, layer: FederatedMoELayer) -> Tensor:
        y_CTD: Tensor = layer(self.inputs.x_CTD.detach().requires_grad_())
        y_CTD.backward(self.inputs.dy_CTD)  # type: ignore[no-untyped-call]
        return y_CTD.detach()

    def gradients(self) -> dict[str, Tensor]:
        """Of the first client's adapters in the first layer: [E, ...] by factor."""
        return {name: self.bank.grads[name][0, :, 0] for name in FACTORS}

    def factors_CT(self) -> Tensor:
        """What the weights of our rule are to be multiplied with: they are the reference."""
        return torch.ones(self.inputs.x_CTD.shape[:2])
