"""Bottleneck experts: two-layer feed-forward adapters, all of them trained, one copy per client in flight.

Legend: N rows (token, expert slots) sorted by group, E experts of this rank, C clients of the wave, D model width,
H bottleneck width.

    h = x U^T + b,   a = gelu(h),   y = (p a) V^T        p: the row's routing weight; U [H, D], V [D, H]

FFT-MoE (arXiv 2508.18663) states experts E_m: R^d -> R^d as two-layer feed-forward networks; width, activation and the absence
of biases are our completion. V starts at zero, so that the first forward pass is the foundation's. Linear experts (a = h) are
LoRA of rank H; of H = 1 they are the ranks of a Mixture of Ranks. Experts that are groups of a block's channels start as these
are, and have the block's bias b [H], which is not trained.

Products take rows of whole 16-byte units: on GPUs torch's grouped kernel does, and on CPUs the path of a product may depend on
where a row lies, and with it on the topology. Narrower bottlenecks are computed with zeros beside them, which add nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fedmoe_ds.kernels.grouped_mm import add_outer_, grouped_mm, grouped_mm_t
from fedmoe_ds.kernels.groups import Groups
from fedmoe_ds.model.experts import Block, Saved

UNIT = 16
"""Bytes of which a row has whole ones."""


class BottleneckExperts:
    """Values U [E, C, H, D] and V [E, C, D, H] in the type of the rows, and where their gradients are added, in float32.

    `linear`: without an activation. `bias_EH` are the frozen biases, the same for all clients.
    """

    def __init__(
        self, inner: Tensor, outer: Tensor, grads: list[Tensor], linear: bool = False, bias_EH: Tensor | None = None
    ) -> None:
        self.inner, self.outer, self.grads, self.linear, self.bias_EH = inner, outer, grads, linear, bias_EH

    def forward(self, block: Block, x_ND: Tensor, p_N: Tensor) -> tuple[Tensor, Saved]:
        """One block. Returns y [N, D] and what `backward` needs."""
        h_NH = grouped_mm(x_ND, _wide(block.pick(self.inner), 1), block.groups)
        if self.bias_EH is not None:
            bias_EH = self.bias_EH[block.held]
            h_NH = h_NH + block.experts.spread(F.pad(bias_EH, (0, h_NH.shape[1] - bias_EH.shape[1])))
        pa_NH = self._activated(h_NH) * p_N.unsqueeze(-1)
        y_ND = grouped_mm(pa_NH, _wide(block.pick(self.outer), 2), block.groups)
        # The activation is computed again in the backward pass; h, which gelu's derivative needs, is kept.
        return y_ND, Saved(x_ND, p_N, h_NH, None, None)

    def backward(self, block: Block, saved: Saved, dy_ND: Tensor, need_dx: bool) -> tuple[Tensor | None, Tensor]:
        """Gradients of one block: dx [N, D] (None unless needed) and dp [N]; those of U and V are added to the bank."""
        groups, h_NH = block.groups, saved.h_N2F
        a_NH = self._activated(h_NH)
        dpa_NH = grouped_mm_t(dy_ND, _wide(block.pick(self.outer), 2), groups)
        _add_gradient_(block.pick(self.grads[1]), dy_ND, a_NH * saved.p_N.unsqueeze(-1), groups)
        # Before the next line multiplies the routing weight into dpa.
        dp_N = (dpa_NH * a_NH).sum(-1)
        dh_NH = dpa_NH.mul_(saved.p_N.unsqueeze(-1))
        if not self.linear:
            dh_NH = torch.ops.aten.gelu_backward(dh_NH, h_NH)
        _add_gradient_(block.pick(self.grads[0]), dh_NH, saved.x_ND, groups)
        return (grouped_mm_t(dh_NH, _wide(block.pick(self.inner), 1), groups) if need_dx else None), dp_N

    def _activated(self, h_NH: Tensor) -> Tensor:
        return h_NH if self.linear else F.gelu(h_NH)


def _wide(weight_GAB: Tensor, axis: int) -> Tensor:
    """With zeros behind the bottleneck's width, which is this axis, up to whole units."""
    lacking = -weight_GAB.shape[axis] % (UNIT // weight_GAB.element_size())
    if not lacking:
        return weight_GAB
    # Pairs count from the last axis.
    return F.pad(weight_GAB, (0, lacking) if axis == 2 else (0, 0, 0, lacking))


def _add_gradient_(grad_GOI: Tensor, y_NO: Tensor, x_NI: Tensor, groups: Groups) -> None:
    """Add Y_g^T X_g, but for what belongs to zeros beside the bottleneck."""
    if (y_NO.shape[1], x_NI.shape[1]) == grad_GOI.shape[1:]:
        add_outer_(grad_GOI, y_NO, x_NI, groups)
        return
    whole_GOI = grad_GOI.new_zeros(len(grad_GOI), y_NO.shape[1], x_NI.shape[1])
    add_outer_(whole_GOI, y_NO, x_NI, groups)
    grad_GOI.add_(whole_GOI[:, : grad_GOI.shape[1], : grad_GOI.shape[2]])
