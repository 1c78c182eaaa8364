"""Channel-group layer: a dense feed-forward block whose experts are groups of its channels, in the place of that block.

Legend: B sequences, S positions, D model width, E experts, F channels of an expert, C client slots.

    y = A(x) + sum over the groups e of x's client of E_e(x)        A: what works for every row, never trained

Rows are routed as in a mixture: a group that a client does not use costs no product and no row that travels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedmoe_ds.foundation.channel_groups import GroupedLayer
from fedmoe_ds.model import experts
from fedmoe_ds.model.adapter_moe_layer import INNER, OUTER
from fedmoe_ds.model.bottleneck_experts import BottleneckExperts
from fedmoe_ds.model.moe_layer import FederatedMoELayer
from fedmoe_ds.model.pass_context import Execution, Pass


class ChannelGroupLayer(FederatedMoELayer):
    """Groups of channels that serve the clients of the running pass."""

    def __init__(self, hosted: GroupedLayer, execution: Execution) -> None:
        super().__init__(hosted, execution)
        self.gated, self.bias_EF = hosted.gated, hosted.bias

    def _logits(self, hidden_BSD: Tensor, run: Pass) -> Tensor:
        # Nobody chooses: the gate takes the groups in their order.
        return hidden_BSD.new_zeros(*hidden_BSD.shape[:-1], self.host.router.num_experts)

    def _experts(self, dtype: torch.dtype) -> experts.Experts:
        if self.gated:
            return super()._experts(dtype)
        bank = self.execution.bank
        inner, outer = (bank.value_in(dtype, name, self.layer) for name in (INNER, OUTER))
        return BottleneckExperts(inner, outer, [bank.grad(name, self.layer) for name in (INNER, OUTER)], bias_EH=self.bias_EF)
