"""Gating: how an expert joins its gate and up projections before the down projection.

Shape suffixes: N rows, F expert width.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GatedUnit:
    """a = g sigmoid(g (slope + cubic g^2)) (u + shift), with g = min(gate, limit) and u = clamp(up, -limit, limit).

    A gated linear unit (Shazeer, arXiv 2002.05202) in one form for all families: SwiGLU as it stands; GEGLU in its tanh
    approximation, since x (1 + tanh z) / 2 = x sigmoid(2 z); and the clamped forms of DeepSeek-V4, GPT-OSS and MiniMax-M3.
    """

    slope: float = 1.0
    cubic: float = 0.0
    shift: float = 0.0
    limit: float = math.inf

    @property
    def plain(self) -> bool:
        """Whether this is SwiGLU, silu(gate) up."""
        return self == SWIGLU

    @property
    def shape(self) -> tuple[float, float, float, float]:
        """(slope, cubic, shift, limit)."""
        return astuple(self)

    def weighted(self, h_N2F: Tensor, p_N: Tensor) -> Tensor:
        """p a, [N, F], by PyTorch's operations. The halves are strided views, so each row is an inner loop of its own."""
        gate_NF, up_NF, share_NF, _ = self._parts(h_N2F)
        # In place: the shares are this call's own, so no further [N, F] is needed.
        return share_NF.mul_(gate_NF).mul_(up_NF).mul_(p_N.unsqueeze(-1))

    def backward(self, h_N2F: Tensor, p_N: Tensor, dpa_NF: Tensor) -> tuple[Tensor, Tensor]:
        """(dh [N, 2F], dp [N]) from the gradient of `weighted`'s result. What a limit cut off has no gradient."""
        gate_NF, up_NF, share_NF, slope_NF = self._parts(h_N2F)
        unit_NF = gate_NF * share_NF
        dp_N = (dpa_NF * (unit_NF * up_NF)).sum(-1)
        da_NF = dpa_NF * p_N.unsqueeze(-1)
        raw_gate_NF, raw_up_NF = h_N2F.chunk(2, dim=-1)
        dgate_NF = da_NF * up_NF * (share_NF + unit_NF * (1 - share_NF) * slope_NF)
        # `>`, not `>=`: at the limit itself the gradient passes, as in the backward pass of torch.clamp.
        dgate_NF = dgate_NF.masked_fill_(raw_gate_NF > self.limit, 0)
        dup_NF = (da_NF * unit_NF).masked_fill_(raw_up_NF.abs() > self.limit, 0)
        return torch.cat([dgate_NF, dup_NF], dim=1), dp_N

    def _parts(self, h_N2F: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """g, u + shift, sigmoid(z) and dz/dg, where z = g (slope + cubic g^2)."""
        # A clone: `backward` needs to know which numbers were cut off.
        cut_N2F, inner_N2F = h_N2F.clone(), torch.empty_like(h_N2F)
        gate_NF, up_NF = cut_N2F.chunk(2, dim=-1)
        gate_NF.clamp_(max=self.limit)
        up_NF.clamp_(-self.limit, self.limit).add_(self.shift)
        square_NF = gate_NF * gate_NF
        z_NF = torch.mul(gate_NF, square_NF * self.cubic + self.slope, out=inner_N2F[:, : gate_NF.shape[1]])
        return gate_NF, up_NF, z_NF.sigmoid(), square_NF.mul_(3 * self.cubic).add_(self.slope)


SWIGLU = GatedUnit()
_TANH = 2 * math.sqrt(2 / math.pi)


def gated_unit(name: str, alpha: float, limit: float) -> GatedUnit | None:
    """The unit that DeepSpeed registers under this name (`deepspeed.moe.ep_experts`); None for one that is not known here.

    Args:
        alpha: the logistic function's slope in `swiglu_oai`; no other form reads it.
        limit: of the clamped forms; no other form reads it.
    """
    forms = {
        "swiglu": SWIGLU,
        "geglu_tanh": GatedUnit(slope=_TANH, cubic=_TANH * 0.044715),
        "swiglu_clamped": GatedUnit(limit=limit),
        "swiglu_oai": GatedUnit(slope=alpha, shift=1.0, limit=limit),
    }
    return forms.get(name)
