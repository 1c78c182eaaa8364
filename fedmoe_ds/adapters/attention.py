"""LoRA on attention projections, one adapter per client.

Legend: B sequences, S positions, D input width, O output width, R adapter rank.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor, nn

from fedmoe_ds.adapters.segmented import client_linear
from fedmoe_ds.errors import UserError
from fedmoe_ds.experts.execution import Execution

_PROJECTION = re.compile(r"(?:^|.*\.)layers\.(\d+)\.\w*att\w*\.(\w+)")


@dataclass(frozen=True)
class Projection:
    """One attention projection of the model."""

    path: str
    layer: int
    name: str
    width_in: int
    width_out: int

    @property
    def block_a(self) -> str:
        return f"attention.{self.name}.lora_A"

    @property
    def block_b(self) -> str:
        return f"attention.{self.name}.lora_B"


def find_projections(model: nn.Module, names: list[str]) -> list[Projection]:
    """The model's attention projections with these names. Raises UserError when a name is not in the model."""
    found = []
    for path, module in model.named_modules():
        match = _PROJECTION.fullmatch(path)
        if match and isinstance(module, nn.Linear):
            found.append(Projection(path, int(match[1]), match[2], module.in_features, module.out_features))
    present = {projection.name for projection in found}
    for name in names:
        if name not in present:
            raise UserError(
                f"adapters.attention: {name}: the model has no such attention projection; choose among {sorted(present)}"
            )
    return [projection for projection in found if projection.name in names]


class ClientLoRALinear(nn.Module):
    """y = x W^T + s (x A_c^T) B_c^T for the rows of each client c of the running pass; W is frozen."""

    def __init__(self, base: nn.Linear, projection: Projection, execution: Execution) -> None:
        super().__init__()
        self.base = base
        self.projection = projection
        self.execution = execution

    def forward(self, x_BSD: Tensor) -> Tensor:
        middle_BSR = self._scaled(self._client_product(x_BSD, self.projection.block_a))
        update_BSO = self._client_product(middle_BSR, self.projection.block_b)
        y_BSO: Tensor = self.base(x_BSD)
        return y_BSO + update_BSO

    def _scaled(self, middle_BSR: Tensor) -> Tensor:
        factors = self.execution.wave.home_factors
        if factors is None:
            return middle_BSR * self.execution.scale
        scales_B = middle_BSR.new_zeros(middle_BSR.shape[0])
        for seg in self.execution.running().segments:
            scales_B[seg.start : seg.stop] = factors[seg.slot] * self.execution.scale
        return middle_BSR * scales_B.view(-1, 1, 1)

    def _client_product(self, x_BSD: Tensor, name: str) -> Tensor:
        bank, layer = self.execution.bank, self.projection.layer
        segments = self.execution.running().segments
        return client_linear(x_BSD, self.execution.anchor, bank.value(name, layer), bank.grad(name, layer), segments)
