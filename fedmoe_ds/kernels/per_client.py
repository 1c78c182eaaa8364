"""Per-client linear algebra on rows that are sorted by client.

Legend: B sequences, S positions, D input width, O output width, C client slots.

A pass holds the rows of one client or of several, one contiguous segment of sequences each. The functions here run one product
per segment and add parameter gradients straight into the bank: no autograd leaf per client, no zero gradients for clients that
are not in the pass. Sums over a client's rows run in row order, so that the rows of padding, whose gradients are zero and whose
number depends on who else is in the pass, change no bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedmoe_ds.kernels.frozen_layers import frozen_rows


@dataclass(frozen=True)
class Segment:
    """Sequences [start, stop) of a pass belong to the client at home slot `slot`; `longest` is the length of its longest."""

    slot: int
    start: int
    stop: int
    longest: int


def room_for(like_BSD: Tensor, width: int, segments: list[Segment]) -> Tensor:
    """Room for the result; zeroed only where rows belong to nobody (the stand-in row of an idle rank)."""
    shape = (*like_BSD.shape[:-1], width)
    covered = sum(seg.stop - seg.start for seg in segments) == like_BSD.shape[0]
    return like_BSD.new_empty(shape) if covered else like_BSD.new_zeros(shape)


class _ClientLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BSD: Tensor, anchor: Tensor, weight_COD: Tensor, grad_COD: Tensor, segments: list[Segment]
    ) -> Tensor:
        ctx.save_for_backward(x_BSD)
        # Bank tensors are attributes and not saved: they are no inputs of autograd, and their gradients go into the bank.
        ctx.weight_COD, ctx.grad_COD, ctx.segments = weight_COD, grad_COD, segments
        y_BSO = room_for(x_BSD, weight_COD.shape[1], segments)
        for seg in segments:
            weight_OD = weight_COD[seg.slot].to(x_BSD.dtype)
            y_BSO[seg.start : seg.stop] = frozen_rows(x_BSD[seg.start : seg.stop], weight_OD, transposed=True)
        return y_BSO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x_BSD,) = ctx.saved_tensors
        dy_BSO = grads[0]
        dx_BSD = room_for(x_BSD, x_BSD.shape[-1], ctx.segments) if ctx.needs_input_grad[0] else None
        for seg in ctx.segments:
            dy_TO = dy_BSO[seg.start : seg.stop].flatten(0, -2)
            x_TD = x_BSD[seg.start : seg.stop].flatten(0, -2)
            # dy^T x with x in the place of the weight: the kernel's chain runs over the rows in their order, and padding rows,
            # whose dy is zero, change no bit of it.
            ctx.grad_COD[seg.slot].add_(frozen_rows(dy_TO.t(), x_TD, transposed=False))
            if dx_BSD is not None:
                weight_OD = ctx.weight_COD[seg.slot].to(x_BSD.dtype)
                dx_BSD[seg.start : seg.stop] = frozen_rows(dy_BSO[seg.start : seg.stop], weight_OD, transposed=False)
        return dx_BSD, None, None, None, None


def client_linear(x_BSD: Tensor, anchor: Tensor, weight_COD: Tensor, grad_COD: Tensor, segments: list[Segment]) -> Tensor:
    """y = x W_c^T for the rows of each client c; the gradient of W_c is added to `grad_COD[c]`.

    `anchor` is any tensor that requires a gradient: it keeps autograd on the path when `x_BSD` does not need one.
    """
    return _ClientLinear.apply(x_BSD, anchor, weight_COD, grad_COD, segments)  # type: ignore[no-any-return, no-untyped-call]


def _in_order(values_BS: Tensor) -> Tensor:
    """Their sum, one after the other: zeros in between change nothing."""
    # cumsum runs one after the other where sum would pair terms by the length, which depends on the other clients' padding.
    return values_BS.flatten().double().cumsum(0)[-1].float()


class _ClientScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_BSD: Tensor, anchor: Tensor, scale_C1: Tensor, grad_C1: Tensor, segments: list[Segment]) -> Tensor:
        ctx.save_for_backward(h_BSD)
        ctx.scale_C1, ctx.grad_C1, ctx.segments = scale_C1, grad_C1, segments
        y_BSD = room_for(h_BSD, h_BSD.shape[-1], segments)
        for seg in segments:
            y_BSD[seg.start : seg.stop] = h_BSD[seg.start : seg.stop] * scale_C1[seg.slot].to(h_BSD.dtype)
        return y_BSD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (h_BSD,) = ctx.saved_tensors
        dy_BSD = grads[0]
        dh_BSD = room_for(h_BSD, h_BSD.shape[-1], ctx.segments)
        for seg in ctx.segments:
            rows = slice(seg.start, seg.stop)
            ctx.grad_C1[seg.slot].add_(_in_order((dy_BSD[rows] * h_BSD[rows]).sum(-1, dtype=torch.float32)))
            dh_BSD[rows] = dy_BSD[rows] * ctx.scale_C1[seg.slot].to(h_BSD.dtype)
        return dh_BSD, None, None, None, None


def client_scale(h_BSD: Tensor, anchor: Tensor, scale_C1: Tensor, grad_C1: Tensor, segments: list[Segment]) -> Tensor:
    """s_c * h for the rows of each client c, with a learnable scalar s_c per client."""
    return _ClientScale.apply(h_BSD, anchor, scale_C1, grad_C1, segments)  # type: ignore[no-any-return, no-untyped-call]


class _ClientBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_TO: Tensor, bias_O: Tensor, grad_O: Tensor) -> Tensor:
        ctx.grad_O = grad_O
        return y_TO + bias_O.to(y_TO.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        dy_TO = grads[0]
        # One row after the other, as in `_in_order`.
        ctx.grad_O.add_(dy_TO.double().cumsum(0)[-1].float())
        return dy_TO, None, None


def client_bias(y_TO: Tensor, bias_O: Tensor, grad_O: Tensor) -> Tensor:
    """y + b for the rows of one client; the gradient of b is added to `grad_O`."""
    return _ClientBias.apply(y_TO, bias_O, grad_O)  # type: ignore[no-any-return, no-untyped-call]
