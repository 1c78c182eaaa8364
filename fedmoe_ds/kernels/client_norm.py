"""RMS norm with a weight per client, on rows that are sorted by client (Zhang & Sennrich, arXiv 1910.07467).

Legend: B sequences, S positions, D width, C client slots.

    y = w_c x / rms(x),   rms(x)^2 = mean(x^2) + eps       for the rows of each client c; the gradient of w_c goes into the bank

As in `per_client.py`, a client's bits do not depend on who else is in the pass: rows are normalised one by one, and sums over a
client's rows run in row order, in which padding, whose gradient is zero, changes nothing.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fedmoe_ds.kernels import rows, rows_on_device
from fedmoe_ds.kernels.frozen_layers import frozen_rows
from fedmoe_ds.kernels.per_client import Segment, room_for


def _kernels(x: Tensor) -> ModuleType | None:
    if rows_on_device.serves(x):
        return rows_on_device
    return rows if rows.serves(x) else None


def _normalised(x: Tensor, one_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / rms, and 1 / rms of every row."""
    found = _kernels(x)
    if found is not None:
        kernel: tuple[Tensor, Tensor] = found.norm(x, one_D, eps)
        return kernel
    inverse = torch.rsqrt(x.float().square().mean(-1) + eps)
    return (x.float() * inverse.unsqueeze(-1)).to(x.dtype), inverse


def _backward(dn: Tensor, x: Tensor, one_D: Tensor, inverse: Tensor) -> Tensor:
    """The gradient for x, from that of x / rms."""
    found = _kernels(x)
    if found is not None:
        kernel: Tensor = found.norm_backward(dn, x, one_D, inverse)
        return kernel
    n, inverse = x.float() * inverse.unsqueeze(-1), inverse.unsqueeze(-1)
    return (inverse * (dn.float() - n * (dn.float() * n).mean(-1, keepdim=True))).to(x.dtype)


class _ClientNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BSD: Tensor, anchor: Tensor, weight_CD: Tensor, grad_CD: Tensor, eps: float, segments: list[Segment]
    ) -> Tensor:
        x_BSD = x_BSD.contiguous()
        one_D = torch.ones(x_BSD.shape[-1], dtype=x_BSD.dtype, device=x_BSD.device)
        n_BSD, inverse = _normalised(x_BSD, one_D, eps)
        ctx.save_for_backward(x_BSD, inverse)
        ctx.one_D, ctx.weight_CD, ctx.grad_CD, ctx.segments = one_D, weight_CD, grad_CD, segments
        y_BSD = room_for(x_BSD, x_BSD.shape[-1], segments)
        for seg in segments:
            torch.mul(n_BSD[seg.start : seg.stop], weight_CD[seg.slot].to(x_BSD.dtype), out=y_BSD[seg.start : seg.stop])
        return y_BSD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BSD, inverse = ctx.saved_tensors
        dy_BSD, width = grads[0], x_BSD.shape[-1]
        dn_BSD = room_for(x_BSD, width, ctx.segments)
        for seg in ctx.segments:
            own = slice(seg.start, seg.stop)
            torch.mul(dy_BSD[own], ctx.weight_CD[seg.slot].to(x_BSD.dtype), out=dn_BSD[own])
            n_TD = (x_BSD[own].float() * inverse.view(x_BSD.shape[:-1])[own].unsqueeze(-1)).view(-1, width)
            each_TD = dy_BSD[own].reshape(-1, width).float() * n_TD
            # A product with ones: the kernel's chain adds the rows up in their order.
            ctx.grad_CD[seg.slot].add_(frozen_rows(each_TD.new_ones(1, len(each_TD)), each_TD, transposed=False).view(width))
        dx_BSD = _backward(dn_BSD, x_BSD, ctx.one_D, inverse) if ctx.needs_input_grad[0] else None
        return dx_BSD, None, None, None, None, None


def client_norm(
    x_BSD: Tensor, anchor: Tensor, weight_CD: Tensor, grad_CD: Tensor, eps: float, segments: list[Segment]
) -> Tensor:
    """RMS norm of the rows of each client c with its own weight, whose gradient is added to `grad_CD[c]`; axes between the
    first and the last may be more than one. `anchor` is as in `client_linear`."""
    return _ClientNorm.apply(x_BSD, anchor, weight_CD, grad_CD, eps, segments)  # type: ignore[no-any-return, no-untyped-call]
