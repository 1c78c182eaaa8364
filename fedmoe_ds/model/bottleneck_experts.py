"""Bottleneck experts: two-layer feed-forward adapters, all of them trained, one copy per client in flight.

Legend: N rows (token, expert slots) sorted by group, E experts of this rank, C clients of the wave, D model width,
H bottleneck width.

    h = x U^T + b,   a = gelu(h),   y = (p a) V^T        p: the row's routing weight; U [H, D], V [D, H]

FFT-MoE (arXiv 2508.18663) states experts E_m: R^d -> R^d as two-layer feed-forward networks; width, activation and the absence
of biases are our completion. V starts at zero, so that the first forward pass is the foundation's. Experts that are groups of
a block's channels start as these are, and have the block's bias b [H], which is not trained.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fedmoe_ds.kernels.grouped_mm import add_outer_, grouped_mm, grouped_mm_t
from fedmoe_ds.model.experts import Block, Saved


class BottleneckExperts:
    """Values U [E, C, H, D] and V [E, C, D, H] in the type of the rows, and where their gradients are added, in float32.

    `bias_EH` are the frozen biases, the same for all clients.
    """

    def __init__(self, inner: Tensor, outer: Tensor, grads: list[Tensor], bias_EH: Tensor | None = None) -> None:
        self.inner, self.outer, self.grads, self.bias_EH = inner, outer, grads, bias_EH

    def forward(self, block: Block, x_ND: Tensor, p_N: Tensor) -> tuple[Tensor, Saved]:
        """One block. Returns y [N, D] and what `backward` needs."""
        h_NH = grouped_mm(x_ND, block.pick(self.inner), block.groups)
        if self.bias_EH is not None:
            h_NH = h_NH + block.experts.spread(self.bias_EH[block.held])
        pa_NH = F.gelu(h_NH).mul_(p_N.unsqueeze(-1))
        y_ND = grouped_mm(pa_NH, block.pick(self.outer), block.groups)
        # The activation is computed again in the backward pass; h, which gelu's derivative needs, is kept.
        return y_ND, Saved(x_ND, p_N, h_NH, None, None)

    def backward(self, block: Block, saved: Saved, dy_ND: Tensor, need_dx: bool) -> tuple[Tensor | None, Tensor]:
        """Gradients of one block: dx [N, D] (None unless needed) and dp [N]; those of U and V are added to the bank."""
        groups, h_NH = block.groups, saved.h_N2F
        a_NH = F.gelu(h_NH)
        dpa_NH = grouped_mm_t(dy_ND, block.pick(self.outer), groups)
        add_outer_(block.pick(self.grads[1]), dy_ND, a_NH * saved.p_N.unsqueeze(-1), groups)
        # Before the next line multiplies the routing weight into dpa.
        dp_N = (dpa_NH * a_NH).sum(-1)
        dh_NH = torch.ops.aten.gelu_backward(dpa_NH.mul_(saved.p_N.unsqueeze(-1)), h_NH)
        add_outer_(block.pick(self.grads[0]), dh_NH, saved.x_ND, groups)
        return (grouped_mm_t(dh_NH, block.pick(self.inner), groups) if need_dx else None), dp_N
