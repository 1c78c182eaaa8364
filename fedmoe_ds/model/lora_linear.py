"""LoRA linear layers: adapters on projections of attention, and of a dense feed-forward block, one per client.

Legend: B sequences, S positions, T = B * S rows sorted by client, C client slots, D input width, O output width, R adapter
rank.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedmoe_ds.config import AdapterConfig
from fedmoe_ds.errors import UserError
from fedmoe_ds.kernels.frozen_layers import frozen_rows
from fedmoe_ds.kernels.groups import Groups, Scale
from fedmoe_ds.kernels.lora_products import LowRankProducts
from fedmoe_ds.model.adapter_dropout import left_through
from fedmoe_ds.model.pass_context import Execution, Pass

# As in `model.layers.3.self_attn.q_proj`: families agree on layers.<n>, on a module name with `att` in it, and on `mlp`.
_PROJECTION = re.compile(r"(?:^|.*\.)layers\.(\d+)\.(?:(\w*att\w*)|mlp)\.(\w+)")


@dataclass(frozen=True)
class Projection:
    """One projection of the model: `part` is `attention` or `feed_forward`, as the configuration calls its section."""

    path: str
    part: str
    layer: int
    name: str
    width_in: int
    width_out: int

    @property
    def block_a(self) -> str:
        return f"{self.part}.{self.name}.lora_A"

    @property
    def block_b(self) -> str:
        return f"{self.part}.{self.name}.lora_B"

    @property
    def weight_key(self) -> str:
        """Canonical name of the frozen weight, as a server keeps it that moves products into it."""
        return f"layers.{self.layer}.{self.part}.{self.name}.base"


def find_projections(model: nn.Module, config: AdapterConfig) -> list[Projection]:
    """The projections that get LoRA, attention's first; asked before other modules stand in their places.

    Raises UserError when a name is not in the model.
    """
    wanted = {"attention": config.attention, "feed_forward": config.feed_forward}
    found = []
    for path, module in model.named_modules():
        match = _PROJECTION.fullmatch(path)
        if match and isinstance(module, nn.Linear):
            part = "attention" if match[2] else "feed_forward"
            found.append(Projection(path, part, int(match[1]), match[3], module.in_features, module.out_features))
    # All projections are looked for before the names are compared, so that a wrong name is answered with those that exist.
    chosen = []
    for part, names in wanted.items():
        there = [projection for projection in found if projection.part == part]
        present = {projection.name for projection in there}
        for name in names:
            if name not in present:
                kind = part.replace("_", "-")
                raise UserError(
                    f"adapters.{part}: {name}: the model has no such {kind} projection; choose among {sorted(present)}"
                )
        chosen += [projection for projection in there if projection.name in names]
    return chosen


@dataclass(frozen=True)
class _Adapters:
    """One projection's adapters of the clients in a pass, [C, ...]; see the legend. Gradients are float32."""

    a_CRD: Tensor
    b_COR: Tensor
    grad_a_CRD: Tensor
    grad_b_COR: Tensor
    groups: Groups  # of each client's rows
    scale: Scale
    products: LowRankProducts
    kept: Callable[[], Tensor] | None = None  # draws dropout's mask [T, D]; the same whenever it is called


class _AdaptedProduct(torch.autograd.Function):
    """y = x W^T + s (x A_c^T) B_c^T; adapter gradients are added to the bank."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, anchor: Tensor, weight_OD: Tensor, adapters: _Adapters) -> Tensor:
        # The kernels walk rows by pointer and width.
        x_TD = x_TD.contiguous()
        kept_TD = None if adapters.kept is None else adapters.kept()
        m_TR = adapters.products.project(left_through(x_TD, kept_TD), adapters.a_CRD, adapters.groups, adapters.scale)
        y_TO = frozen_rows(x_TD, weight_OD, transposed=True)
        adapters.products.expand_(y_TO, m_TR, adapters.b_COR, adapters.groups)
        # m has R columns only: keeping it is cheaper than projecting x once more.
        ctx.save_for_backward(x_TD, m_TR)
        ctx.weight_OD, ctx.adapters = weight_OD, adapters
        return y_TO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        adapters: _Adapters = ctx.adapters
        (x_TD, m_TR), dy_TO, groups = ctx.saved_tensors, grads[0].contiguous(), adapters.groups
        adapters.products.grad_b_(adapters.grad_b_COR, m_TR, dy_TO, groups)
        dm_TR = adapters.products.back_project(dy_TO, adapters.b_COR, groups, adapters.scale)
        # Drawn again: one pass over x costs less than a mask per projection that is kept until here.
        kept_TD = None if adapters.kept is None else adapters.kept()
        adapters.products.grad_a_(adapters.grad_a_CRD, dm_TR, left_through(x_TD, kept_TD), groups)
        # The first layer's input comes from a frozen embedding; its gradient would be thrown away.
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        dx_TD = frozen_rows(dy_TO, ctx.weight_OD, transposed=False)
        if kept_TD is None:
            adapters.products.back_expand_(dx_TD, dm_TR, adapters.a_CRD, groups)
        else:
            through_TD = torch.zeros_like(dx_TD)
            adapters.products.back_expand_(through_TD, dm_TR, adapters.a_CRD, groups)
            dx_TD.add_(left_through(through_TD, kept_TD))
        return dx_TD, None, None, None


class ClientLoRALinear(nn.Module):
    """y = x W^T + s (x A_c^T) B_c^T for the rows of each client c of the running pass; W is frozen."""

    def __init__(self, base: nn.Linear, projection: Projection, execution: Execution) -> None:
        super().__init__()
        self.base = base
        self.projection = projection
        self.execution = execution

    def forward(self, x_BSD: Tensor) -> Tensor:
        run = self.execution.running()
        if not run.segments:  # the stand-in row of an idle rank belongs to nobody, but needs a gradient where other rows do
            y_BSO: Tensor = self.base(x_BSD) + 0.0 * self.execution.anchor_of(self.projection.layer)
            return y_BSO
        x_TD = x_BSD.flatten(0, -2)
        adapters = self._adapters(run.row_groups(len(x_TD), self._clients()), x_TD.dtype, self._kept(run, x_TD))
        y_TO: Tensor = _AdaptedProduct.apply(  # type: ignore[no-untyped-call]
            x_TD, self.execution.anchor_of(self.projection.layer), self.base.weight, adapters
        )
        # The bias is frozen, so it stays outside the autograd function.
        y_TO = y_TO if self.base.bias is None else y_TO + self.base.bias
        return y_TO.view(*x_BSD.shape[:-1], -1)

    def _clients(self) -> int:
        return self.execution.bank.value(self.projection.block_a, self.projection.layer).shape[0]

    def _kept(self, run: Pass, x_TD: Tensor) -> Callable[[], Tensor] | None:
        dropout, place = self.execution.dropout, (self.projection.layer, f"{self.projection.part}.{self.projection.name}")
        if dropout is None or run.drawn_at is None:
            return None
        return partial(dropout.kept, run.segments, run.drawn_at, place, x_TD.shape, x_TD.device)

    def _adapters(self, groups: Groups, dtype: torch.dtype, kept: Callable[[], Tensor] | None) -> _Adapters:
        bank, layer = self.execution.bank, self.projection.layer
        names = (self.projection.block_a, self.projection.block_b)
        a, b = (bank.value_in(dtype, name, layer) for name in names)
        grad_a, grad_b = (bank.grad(name, layer) for name in names)
        products = self.execution.products_for(a.shape[1], dtype, self.base.weight.device)
        one = self.execution.scale
        if kept is not None and self.execution.dropout is not None:
            one *= self.execution.dropout.gain  # on the middle, which is R wide, and not on x
        # Adapters of projections live on the client's home rank alone, so slots and factors here are those of home.
        factors = self.execution.wave.home_factors
        scale = one if factors is None else factors.of_groups(one, 1, groups.ends_G.device)
        return _Adapters(a, b, grad_a, grad_b, groups, scale, products, kept)
