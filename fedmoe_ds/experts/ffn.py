"""The expert feed-forward: frozen base plus per-(client, expert) LoRA, forward and backward.

Legend: N rows (token, expert slots) sorted by group, E experts of this rank, C clients of the wave, D model width,
F expert width, R adapter rank.

    h = x W13^T + s (x A13^T) B13^T            gate and up projections side by side, one shared A13
    a = silu(h[:, :F]) * h[:, F:]
    y = (p a) W2^T + s ((p a) A2^T) B2^T       p: the row's routing weight

The routing weight is applied before the down projection. That is the same function as weighting the result, but its gradient is
then a product of width F instead of D, and nothing of width D has to be kept for the backward pass.
Shared A13: LoRA on the fused gate_up matrix that Hugging Face stores, so adapters exchange with PEFT's `target_parameters`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedmoe_ds.experts.grouped import grouped_mm, grouped_mm_t, grouped_outer


@dataclass(frozen=True)
class Lora:
    """Adapters of one layer: values and gradients [E, C, ...], see the legend; `scale` is alpha / rank."""

    a13: Tensor  # [E, C, R, D]
    b13: Tensor  # [E, C, 2F, R]
    a2: Tensor  # [E, C, R, F]
    b2: Tensor  # [E, C, D, R]
    grads: list[Tensor]  # of a13, b13, a2, b2
    scale: float


@dataclass(frozen=True)
class Block:
    """Rows [start, stop) that go through one set of kernels.

    `slot` picks one client (groups = experts); None means all clients (groups = experts x clients, in that order).
    """

    start: int
    stop: int
    slot: int | None
    expert_ends_E: Tensor  # int32
    lora_ends_G: Tensor  # int32; the same tensor when slot is given

    def pick(self, weight: Tensor) -> Tensor:
        """[G, ...]: the block's group weights out of [E, C, ...] (a view)."""
        return weight[:, self.slot] if self.slot is not None else weight.flatten(0, 1)


@dataclass
class Saved:
    """What the backward pass of one block needs."""

    x_ND: Tensor
    p_N: Tensor
    h_N2F: Tensor
    m13_NR: Tensor | None
    m2_NR: Tensor | None


def forward(block: Block, x_ND: Tensor, p_N: Tensor, w13: Tensor, w2: Tensor, lora: Lora | None) -> tuple[Tensor, Saved]:
    """One block. Returns y [N, D] and what `backward` needs."""
    h_N2F = grouped_mm(x_ND, w13, block.expert_ends_E)
    m13_NR = m2_NR = None
    if lora is not None:
        m13_NR = grouped_mm(x_ND, block.pick(lora.a13), block.lora_ends_G).mul_(lora.scale)
        h_N2F.add_(grouped_mm(m13_NR, block.pick(lora.b13), block.lora_ends_G))
    pa_NF = _activation(h_N2F).mul_(p_N.unsqueeze(-1))
    y_ND = grouped_mm(pa_NF, w2, block.expert_ends_E)
    if lora is not None:
        m2_NR = grouped_mm(pa_NF, block.pick(lora.a2), block.lora_ends_G).mul_(lora.scale)
        y_ND.add_(grouped_mm(m2_NR, block.pick(lora.b2), block.lora_ends_G))
    return y_ND, Saved(x_ND, p_N, h_N2F, m13_NR, m2_NR)


def backward(
    block: Block, saved: Saved, dy_ND: Tensor, w13: Tensor, w2: Tensor, lora: Lora | None, need_dx: bool
) -> tuple[Tensor | None, Tensor]:
    """Gradients of one block: dx [N, D] (None unless needed) and dp [N]; adapter gradients are added to `lora.grads`."""
    gate_NF, up_NF = saved.h_N2F.chunk(2, dim=-1)
    a_NF = _activation(saved.h_N2F)
    dpa_NF = grouped_mm_t(dy_ND, w2, block.expert_ends_E)
    if lora is not None:
        assert saved.m2_NR is not None
        pa_NF = a_NF * saved.p_N.unsqueeze(-1)
        dpa_NF.add_(_lora_backward(block, lora, 1, pa_NF, saved.m2_NR, dy_ND))
    dp_N = (dpa_NF * a_NF).sum(-1)
    da_NF = dpa_NF.mul_(saved.p_N.unsqueeze(-1))
    dh_N2F = torch.empty_like(saved.h_N2F)
    torch.mul(da_NF, F.silu(gate_NF), out=dh_N2F[:, up_NF.shape[1] :])
    dh_N2F[:, : gate_NF.shape[1]] = torch.ops.aten.silu_backward(da_NF * up_NF, gate_NF)
    if lora is None:
        return (grouped_mm_t(dh_N2F, w13, block.expert_ends_E) if need_dx else None), dp_N
    assert saved.m13_NR is not None
    dx_lora_ND = _lora_backward(block, lora, 0, saved.x_ND, saved.m13_NR, dh_N2F, need_dx)
    if not need_dx:
        return None, dp_N
    return grouped_mm_t(dh_N2F, w13, block.expert_ends_E).add_(dx_lora_ND), dp_N


def _lora_backward(
    block: Block, lora: Lora, which: int, x_NI: Tensor, m_NR: Tensor, dy_NO: Tensor, need_dx: bool = True
) -> Tensor:
    """Add the gradients of one (A, B) pair to the bank; return the gradient of its input. `m` is the scaled middle."""
    a, b = (lora.a13, lora.b13) if which == 0 else (lora.a2, lora.b2)
    da, db = lora.grads[2 * which], lora.grads[2 * which + 1]
    ends = block.lora_ends_G
    _accumulate(block, db, grouped_outer(dy_NO, m_NR, ends))
    dm_NR = grouped_mm_t(dy_NO, block.pick(b), ends).mul_(lora.scale)
    _accumulate(block, da, grouped_outer(dm_NR, x_NI, ends))
    return grouped_mm_t(dm_NR, block.pick(a), ends) if need_dx else x_NI


def _accumulate(block: Block, grad: Tensor, update_G: Tensor) -> None:
    if block.slot is not None:
        grad[:, block.slot].add_(update_G)
    else:
        grad.flatten(0, 1).add_(update_G)


def _activation(h_N2F: Tensor) -> Tensor:
    """SwiGLU. The halves are strided views, so each row is an inner loop of its own and rows cannot influence each other."""
    gate_NF, up_NF = h_N2F.chunk(2, dim=-1)
    return F.silu(gate_NF).mul_(up_NF)
