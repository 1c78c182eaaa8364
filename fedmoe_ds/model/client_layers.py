"""Client layers: dense layers of the model that belong to clients, each with weights of its own in the bank.

Legend: B sequences, S positions, D input width, O output width, C client slots.

A matrix [O, D], or the weight [D] of an RMS norm, is a dense block like any other: what the server sends are its values, the
rows of a client go through the client's own copy, and what comes back is averaged. The frozen model has no memory for them.
Each client in flight holds values, gradients and moments of whole layers; `execution.owned_gib` bounds that.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fedmoe_ds.foundation import Foundation
from fedmoe_ds.foundation.expansion import OUTPUTS, Expansion
from fedmoe_ds.kernels.client_norm import client_norm
from fedmoe_ds.kernels.per_client import client_linear
from fedmoe_ds.model.adapter_bank import OWNED, BlockSpec
from fedmoe_ds.model.pass_context import Execution


class ClientLinear(nn.Module):
    """y = x W_c^T for the rows of each client c of the running pass."""

    def __init__(self, block: str, layer: int, execution: Execution) -> None:
        super().__init__()
        self.block, self.layer, self.execution = block, layer, execution

    def forward(self, x_BSD: Tensor) -> Tensor:
        execution, bank = self.execution, self.execution.bank
        weight_COD = bank.value_in(x_BSD.dtype, self.block, self.layer)
        places = (weight_COD, bank.grad(self.block, self.layer), execution.running().segments)
        return client_linear(x_BSD.contiguous(), execution.anchor_of(self.layer), *places)


class ClientNorm(nn.Module):
    """y = w_c x / rms(x) for the rows of each client c of the running pass."""

    def __init__(self, block: str, layer: int, eps: float, execution: Execution) -> None:
        super().__init__()
        self.block, self.layer, self.eps, self.execution = block, layer, eps, execution

    def forward(self, hidden_states: Tensor) -> Tensor:
        execution, bank = self.execution, self.execution.bank
        values = (bank.value(self.block, self.layer), bank.grad(self.block, self.layer))
        return client_norm(hidden_states, execution.anchor_of(self.layer), *values, self.eps, execution.running().segments)


def owned_blocks(model: Any, expansion: Expansion) -> list[BlockSpec]:
    """The weights of further layers; those of norms do not decay."""
    return [
        BlockSpec(f"{OWNED}{path}.weight", expansion.layers, shape, decay=len(shape) > 1)
        for path, shape in expansion.weights(model)
    ]


def put_client_layers(model: Any, expansion: Expansion, execution: Execution) -> None:
    """Put layers that read the bank into the places of those without memory."""
    for layer in expansion.layers:
        inside = model.base_model.layers[layer]
        for path, module in list(inside.named_modules()):
            block = f"{OWNED}{path}.weight"
            if block in execution.bank:
                owner, _, leaf = path.rpartition(".")
                setattr(inside.get_submodule(owner), leaf, _own(module, block, layer, execution))


def _own(module: nn.Module, block: str, layer: int, execution: Execution) -> nn.Module:
    if isinstance(module, nn.Linear):
        return ClientLinear(block, layer, execution)
    eps = module.variance_epsilon
    assert isinstance(eps, float), "an RMS norm"
    return ClientNorm(block, layer, eps, execution)


def first_values(foundation: Foundation, blocks: list[BlockSpec]) -> dict[str, Tensor]:
    """What further layers begin as, by canonical key: the layer before each; what is not named is zero."""
    model: Any = foundation.model
    found: dict[str, Tensor] = {}
    for block in (block for block in blocks if block.owned):
        path = block.name.removeprefix(OWNED).removesuffix(".weight")
        # With nothing added to the residual stream, a layer is the identity.
        if path not in OUTPUTS:
            found |= {block.key(layer): model.base_model.layers[layer - 1].get_submodule(path).weight for layer in block.layers}
    return found
