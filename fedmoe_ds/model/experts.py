"""Experts, their feed-forward: frozen base plus per-(client, expert) LoRA, or whole weights per client; forward and backward.

Legend: N rows (token, expert slots) sorted by group, E experts of this rank, C clients of the wave, D model width,
F expert width, R adapter rank.

    h = x W13^T + s (x A13^T) B13^T            gate and up projections side by side, one shared A13
    a = unit(h[:, :F], h[:, F:])               SwiGLU, silu(gate) * up, unless the layer says otherwise (`GatedUnit`)
    y = (p a) W2^T + s ((p a) A2^T) B2^T       p: the row's routing weight

The routing weight is applied before the down projection. That is the same function as weighting the result, but its gradient is
then a product of width F instead of D, and nothing of width D has to be kept for the backward pass.
Shared A13: LoRA on the fused gate_up matrix that Hugging Face stores, so adapters exchange with PEFT's `target_parameters`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from types import ModuleType
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fedmoe_ds.foundation.gating import SWIGLU, GatedUnit
from fedmoe_ds.kernels import rows, rows_on_device
from fedmoe_ds.kernels.grouped_mm import add_outer_, grouped_mm, grouped_mm_t
from fedmoe_ds.kernels.groups import Groups, Scale
from fedmoe_ds.kernels.lora_products import LowRankProducts
from fedmoe_ds.model.scale_factors import ScaleFactors


@dataclass(frozen=True)
class Lora:
    """Adapters of one layer: values and gradients [E, C, ...], see the legend; `scale` is alpha / rank.

    Values have the type that products multiply in. `factors` multiply the scale, one per wave slot; None where all are 1.
    """

    a13: Tensor  # [E, C, R, D]
    b13: Tensor  # [E, C, 2F, R]
    a2: Tensor  # [E, C, R, F]
    b2: Tensor  # [E, C, D, R]
    grads: list[Tensor]  # of a13, b13, a2, b2; float32
    scale: float
    products: LowRankProducts
    factors: ScaleFactors | None = None

    def scale_of(self, block: Block) -> Scale:
        """One number for the rows of a block, or one per group where its clients differ."""
        if self.factors is None:
            return self.scale
        if block.slot is not None:
            return self.scale * self.factors.each[block.slot]
        return self.factors.of_groups(self.scale, len(block.experts), block.lora_ends_G.device)


@dataclass(frozen=True)
class Block:
    """Rows [start, stop) that go through one set of kernels.

    `slot` picks one client (groups = experts); None means all clients (groups = experts x clients, in that order). `held` are
    the rank's experts that the rows go through, where it is not all of them.
    """

    start: int
    stop: int
    slot: int | None
    expert_ends_E: Tensor  # int32
    lora_ends_G: Tensor  # int32; the same tensor when slot is given
    held: slice = field(default_factory=lambda: slice(None))

    @cached_property
    def experts(self) -> Groups:
        """The rows of each expert, made once for all products of a plan."""
        return Groups(self.expert_ends_E, self.stop - self.start)

    @cached_property
    def groups(self) -> Groups:
        """The rows of each (expert, client)."""
        return self.experts if self.slot is not None else Groups(self.lora_ends_G, self.stop - self.start)

    def pick(self, weight: Tensor) -> Tensor:
        """[G, ...]: the block's group weights out of [E, C, ...] (a view)."""
        own = weight[self.held]
        return own[:, self.slot] if self.slot is not None else own.flatten(0, 1)


@dataclass
class Saved:
    """What the backward pass of one block needs."""

    x_ND: Tensor
    p_N: Tensor
    h_N2F: Tensor
    m13_NR: Tensor | None
    m2_NR: Tensor | None


class FrozenExperts:
    """The pool's own weights [E, 2F, D] and [E, D, F], the same for all clients, with or without adapters."""

    def __init__(self, w13: Tensor, w2: Tensor, lora: Lora | None, unit: GatedUnit = SWIGLU) -> None:
        self.w13, self.w2, self.lora, self.unit = w13, w2, lora, unit

    def forward(self, block: Block, x_ND: Tensor, p_N: Tensor) -> tuple[Tensor, Saved]:
        """One block. Returns y [N, D] and what `backward` needs."""
        lora = self.lora
        # The base product groups by expert alone: rows of all clients share the frozen weights and one larger product.
        h_N2F = grouped_mm(x_ND, self.w13[block.held], block.experts)
        m13_NR = m2_NR = None
        if lora is not None:
            m13_NR = lora.products.project(x_ND, block.pick(lora.a13), block.groups, lora.scale_of(block))
            # Added in place, before the activation: the native kernels need no [N, 2F] delta of the adapters' own.
            lora.products.expand_(h_N2F, m13_NR, block.pick(lora.b13), block.groups)
        pa_NF = _weighted_activation(self.unit, h_N2F, p_N)
        y_ND = grouped_mm(pa_NF, self.w2[block.held], block.experts)
        if lora is not None:
            m2_NR = lora.products.project(pa_NF, block.pick(lora.a2), block.groups, lora.scale_of(block))
            lora.products.expand_(y_ND, m2_NR, block.pick(lora.b2), block.groups)
        # h is kept and pa is not: pa is one elementwise pass over h, and keeping both would add half of h again.
        return y_ND, Saved(x_ND, p_N, h_N2F, m13_NR, m2_NR)

    def backward(self, block: Block, saved: Saved, dy_ND: Tensor, need_dx: bool) -> tuple[Tensor | None, Tensor]:
        """Gradients of one block: dx [N, D] (None unless needed) and dp [N]; adapter gradients are added to `lora.grads`."""
        lora = self.lora
        dpa_NF = grouped_mm_t(dy_ND, self.w2[block.held], block.experts)
        if lora is not None and saved.m2_NR is not None:
            pa_NF = _weighted_activation(self.unit, saved.h_N2F, saved.p_N)
            # Before the activation's backward: LoRA's own part of the gradient of pa is added to dpa here.
            _lora_backward(block, lora, 1, pa_NF, saved.m2_NR, dy_ND, dpa_NF)
        dh_N2F, dp_N = _activation_backward(self.unit, saved.h_N2F, saved.p_N, dpa_NF)
        # Without need_dx nothing below this layer is trained, and the widest product of the backward pass is saved.
        dx_ND = grouped_mm_t(dh_N2F, self.w13[block.held], block.experts) if need_dx else None
        if lora is not None and saved.m13_NR is not None:
            _lora_backward(block, lora, 0, saved.x_ND, saved.m13_NR, dh_N2F, dx_ND)
        return dx_ND, dp_N


class OwnExperts:
    """Whole weights per client, [E, C, 2F, D] and [E, C, D, F], all of them trained (full fine-tuning of the experts)."""

    def __init__(self, w13: Tensor, w2: Tensor, grads: list[Tensor], unit: GatedUnit = SWIGLU) -> None:
        self.w13, self.w2, self.grads, self.unit = w13, w2, grads, unit

    def forward(self, block: Block, x_ND: Tensor, p_N: Tensor) -> tuple[Tensor, Saved]:
        """As `FrozenExperts.forward`."""
        # Weights differ by client here, so the groups are (expert, client) where adapters' groups are.
        h_N2F = grouped_mm(x_ND, block.pick(self.w13), block.groups)
        pa_NF = _weighted_activation(self.unit, h_N2F, p_N)
        return grouped_mm(pa_NF, block.pick(self.w2), block.groups), Saved(x_ND, p_N, h_N2F, None, None)

    def backward(self, block: Block, saved: Saved, dy_ND: Tensor, need_dx: bool) -> tuple[Tensor | None, Tensor]:
        """As `FrozenExperts.backward`."""
        groups = block.groups
        dpa_NF = grouped_mm_t(dy_ND, block.pick(self.w2), groups)
        pa_NF = _weighted_activation(self.unit, saved.h_N2F, saved.p_N)
        add_outer_(block.pick(self.grads[1]), dy_ND, pa_NF, groups)
        dh_N2F, dp_N = _activation_backward(self.unit, saved.h_N2F, saved.p_N, dpa_NF)
        add_outer_(block.pick(self.grads[0]), dh_N2F, saved.x_ND, groups)
        return (grouped_mm_t(dh_N2F, block.pick(self.w13), groups) if need_dx else None), dp_N


class Experts(Protocol):
    """What the dispatch sends rows through."""

    def forward(self, block: Block, x_ND: Tensor, p_N: Tensor) -> tuple[Tensor, Saved]: ...

    def backward(self, block: Block, saved: Saved, dy_ND: Tensor, need_dx: bool) -> tuple[Tensor | None, Tensor]: ...


def _lora_backward(
    block: Block, lora: Lora, which: int, x_NI: Tensor, m_NR: Tensor, dy_NO: Tensor, dx_NI: Tensor | None
) -> None:
    """Add the gradients of one (A, B) pair to the bank, and that of its input to `dx`. `m` is the scaled middle."""
    a, b = (lora.a13, lora.b13) if which == 0 else (lora.a2, lora.b2)
    # m carries the scale already, and dm gets it below: each of dA and dB then holds it exactly once.
    lora.products.grad_b_(block.pick(lora.grads[2 * which + 1]), m_NR, dy_NO, block.groups)
    dm_NR = lora.products.back_project(dy_NO, block.pick(b), block.groups, lora.scale_of(block))
    lora.products.grad_a_(block.pick(lora.grads[2 * which]), dm_NR, x_NI, block.groups)
    if dx_NI is not None:
        lora.products.back_expand_(dx_NI, dm_NR, block.pick(a), block.groups)


def _weighted_activation(unit: GatedUnit, h_N2F: Tensor, p_N: Tensor) -> Tensor:
    """p unit(h), [N, F]. The halves are strided views, so each row is an inner loop of its own and rows cannot influence
    each other, in PyTorch's operations as in rows.cpp."""
    kernels = _kernels(h_N2F, p_N)
    if kernels is None:
        return _torch_activation(h_N2F, p_N) if unit.plain else unit.weighted(h_N2F, p_N)
    p_N = p_N.contiguous()
    found: Tensor = kernels.swiglu(h_N2F, p_N) if unit.plain else kernels.gated(h_N2F, p_N, unit.shape)
    return found


def _kernels(*tensors: Tensor) -> ModuleType | None:
    """Row kernels for these tensors: `rows`, `rows_triton`, or none."""
    return rows if rows.serves(*tensors) else rows_on_device.kernels(tensors[0])


def _torch_activation(h_N2F: Tensor, p_N: Tensor) -> Tensor:
    gate_NF, up_NF = h_N2F.chunk(2, dim=-1)
    return F.silu(gate_NF).mul_(up_NF).mul_(p_N.unsqueeze(-1))


def _activation_backward(unit: GatedUnit, h_N2F: Tensor, p_N: Tensor, dpa_NF: Tensor) -> tuple[Tensor, Tensor]:
    """(dh [N, 2F], dp [N]) from the gradient of p a, which may be overwritten."""
    # The kernels take one pass over memory; the torch path below takes one per operation.
    kernels = _kernels(h_N2F, p_N, dpa_NF)
    if kernels is None:
        return _torch_backward(h_N2F, p_N, dpa_NF) if unit.plain else unit.backward(h_N2F, p_N, dpa_NF)
    p_N, shape = p_N.contiguous(), () if unit.plain else (unit.shape,)
    backward = kernels.swiglu_backward if unit.plain else kernels.gated_backward
    found: tuple[Tensor, Tensor] = backward(h_N2F, p_N, dpa_NF, *shape)
    return found


def _torch_backward(h_N2F: Tensor, p_N: Tensor, dpa_NF: Tensor) -> tuple[Tensor, Tensor]:
    gate_NF, up_NF = h_N2F.chunk(2, dim=-1)
    width, silu_NF = gate_NF.shape[1], F.silu(gate_NF)
    # First: dp needs dpa without the weight, and the next line multiplies the weight into it.
    dp_N = (dpa_NF * (silu_NF * up_NF)).sum(-1)
    da_NF = dpa_NF.mul_(p_N.unsqueeze(-1))
    dh_N2F = torch.empty_like(h_N2F)
    # Both halves are written into one tensor, because the next product reads gate and up side by side.
    # The up half comes first: the gate half's line overwrites da.
    torch.mul(da_NF, silu_NF, out=dh_N2F[:, width:])
    torch.ops.aten.silu_backward.grad_input(da_NF.mul_(up_NF), gate_NF, grad_input=dh_N2F[:, :width])
    return dh_N2F, dp_N
