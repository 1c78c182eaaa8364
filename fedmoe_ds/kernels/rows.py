"""Rows: what happens to them between matrix products, and the AdamW steps of clients, by rows.cpp: float32 on the CPU.

Legend: T or N rows, H heads, K head width, D model width, F expert width.

Callers ask `serves` first and use PyTorch's operations where the answer is no.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmoe_ds.kernels.compiling import FLOAT, POINTER, SIZE, library

# Declared, because ctypes would pass Python integers as 32 bits and refuse floats.
_ARGUMENTS = {
    "norm": [*[POINTER] * 4, SIZE, SIZE, FLOAT],
    "norm_backward": [*[POINTER] * 5, SIZE, SIZE],
    "rotate": [*[POINTER] * 4, SIZE, SIZE, SIZE, FLOAT],
    "swiglu": [*[POINTER] * 3, SIZE, SIZE],
    "swiglu_backward": [*[POINTER] * 5, SIZE, SIZE],
    "gated": [*[POINTER] * 3, SIZE, SIZE, *[FLOAT] * 4],
    "gated_backward": [*[POINTER] * 5, SIZE, SIZE, *[FLOAT] * 4],
    "squared_norms": [*[POINTER] * 2, SIZE, SIZE],
    "adamw": [*[POINTER] * 5, *[SIZE] * 4, *[FLOAT] * 4],
    "adamw_half": [*[POINTER] * 6, *[SIZE] * 4, *[FLOAT] * 4],
}


@functools.cache
def _library() -> ctypes.CDLL | None:
    found = library("rows")
    for name, arguments in _ARGUMENTS.items() if found is not None else ():
        getattr(found, name).argtypes = arguments
    return found


def available() -> bool:
    """Whether the kernels could be compiled here."""
    return _library() is not None


def serves(*tensors: Tensor) -> bool:
    """Whether the kernels take these tensors."""
    return all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors) and _library() is not None


def _run(name: str, tensors: tuple[Tensor, ...], *numbers: float) -> None:
    for tensor in tensors:
        # C sees pointers only: a wrong type or stride would not fail, it would read other numbers.
        assert tensor.dtype == torch.float32 and tensor.is_contiguous(), (name, tensor.dtype, tensor.stride())
    getattr(_library(), name)(*[tensor.data_ptr() for tensor in tensors], *numbers)


def norm(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMS norm over the last axis (Zhang & Sennrich, arXiv 1910.07467): y like x, and 1 / rms per row."""
    width = x.shape[-1]
    y, inverse = torch.empty_like(x), x.new_empty(x.numel() // width)
    _run("norm", (x, weight_D, y, inverse), inverse.numel(), width, eps)
    return y, inverse


def norm_backward(dy: Tensor, x: Tensor, weight_D: Tensor, inverse: Tensor) -> Tensor:
    """The gradient of `norm` for x."""
    dx = torch.empty_like(x)
    _run("norm_backward", (dy, x, weight_D, inverse, dx), inverse.numel(), x.shape[-1])
    return dx


def rotate(x_THK: Tensor, cosine_TK: Tensor, sine_TK: Tensor, back: bool = False) -> Tensor:
    """Rotary position embedding with rotated halves (Su et al., arXiv 2104.09864), or its gradient with `back`."""
    rows, heads, width = x_THK.shape
    assert width % 2 == 0 and cosine_TK.shape == sine_TK.shape == (rows, width), (x_THK.shape, cosine_TK.shape)
    y_THK = torch.empty_like(x_THK)
    # A rotation's gradient is the rotation back: the same loop with the other sign of the sine.
    _run("rotate", (x_THK, cosine_TK, sine_TK, y_THK), rows, heads, width, -1.0 if back else 1.0)
    return y_THK


def swiglu(h_N2F: Tensor, p_N: Tensor) -> Tensor:
    """p silu(gate) up, [N, F]; h holds the gate's half, then the other."""
    pa_NF = h_N2F.new_empty(h_N2F.shape[0], h_N2F.shape[1] // 2)
    _run("swiglu", (h_N2F, p_N, pa_NF), *pa_NF.shape)
    return pa_NF


def swiglu_backward(h_N2F: Tensor, p_N: Tensor, dpa_NF: Tensor) -> tuple[Tensor, Tensor]:
    """(dh [N, 2F], dp [N]) from the gradient of `swiglu`'s result."""
    dh_N2F, dp_N = torch.empty_like(h_N2F), torch.empty_like(p_N)
    _run("swiglu_backward", (h_N2F, p_N, dpa_NF, dh_N2F, dp_N), *dpa_NF.shape)
    return dh_N2F, dp_N


def gated(h_N2F: Tensor, p_N: Tensor, shape: tuple[float, float, float, float]) -> Tensor:
    """p g sigmoid(g (slope + cubic g^2)) (u + shift), [N, F], with g = min(gate, limit) and u = clamp(up, -limit, limit).

    Args:
        h_N2F: the gate's half, then the other.
        p_N: a factor per row.
        shape: slope, cubic, shift, limit.
    """
    pa_NF = h_N2F.new_empty(h_N2F.shape[0], h_N2F.shape[1] // 2)
    _run("gated", (h_N2F, p_N, pa_NF), *pa_NF.shape, *shape)
    return pa_NF


def gated_backward(
    h_N2F: Tensor, p_N: Tensor, dpa_NF: Tensor, shape: tuple[float, float, float, float]
) -> tuple[Tensor, Tensor]:
    """(dh [N, 2F], dp [N]) from the gradient of `gated`'s result."""
    dh_N2F, dp_N = torch.empty_like(h_N2F), torch.empty_like(p_N)
    _run("gated_backward", (h_N2F, p_N, dpa_NF, dh_N2F, dp_N), *dpa_NF.shape, *shape)
    return dh_N2F, dp_N


def squared_norms(x: Tensor, item_axes: int) -> Tensor:
    """float64, for each item of the last `item_axes` axes the sum of its squares, in one order whatever its neighbours are."""
    head = x.shape[: x.dim() - item_axes]
    sums = x.new_empty(head, dtype=torch.float64)
    assert x.dtype == torch.float32 and x.is_contiguous(), (x.dtype, x.stride())
    found = _library()
    assert found is not None, "ask `serves` first"
    found.squared_norms(x.data_ptr(), sums.data_ptr(), sums.numel(), math.prod(x.shape[len(head) :]))
    return sums


class AdamwStep(ctypes.Structure):
    """One client's step: its place on the client axis; `keep` is 1 - lr * decay, `root` sqrt(1 - beta2^t), `rate`
    lr / (1 - beta1^t) for the t-th step of the client."""

    _fields_ = (("place", SIZE), ("clip", FLOAT), ("keep", FLOAT), ("root", FLOAT), ("rate", FLOAT))


def adamw(
    value: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    item_axes: int,
    steps: Sequence[AdamwStep],
    *,
    betas: tuple[float, float],
    eps: float,
    keys: Sequence[NDArray[np.uint64]] | None = None,
) -> None:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) in place, one step of each of several clients; gradients are cleared.

    All four tensors are [..., clients, *item], `item_axes` of the axes are the item's. With `keys`
    (`fedmoe_ds.clients.stochastic_rounding`), one per step and item, moments are bfloat16 and rounded at random; without,
    float32.
    """
    # A block without items (no experts here, no layers) has nothing to step.
    if value.numel() == 0 or not steps:
        return
    axis = value.dim() - item_axes - 1
    clients, size = value.shape[axis], math.prod(value.shape[axis + 1 :])
    items = value.numel() // (clients * size)
    kept = torch.float32 if keys is None else torch.bfloat16
    for tensor, dtype in ((value, torch.float32), (grad, torch.float32), (first, kept), (second, kept)):
        assert tensor.dtype == dtype and tensor.is_contiguous() and tensor.shape == value.shape
    assert all(0 <= step.place < clients for step in steps)
    found = _library()
    assert found is not None, "ask `serves` first"
    pointers = [tensor.data_ptr() for tensor in (value, grad, first, second)]
    # 1 - beta is taken here, in float64: in float32, 1 - beta2 would be off by 5e-5 of itself.
    numbers = (len(steps), items, clients, size, 1.0 - betas[0], betas[1], 1.0 - betas[1], eps)
    table = (AdamwStep * len(steps))(*steps)
    if keys is None:
        found.adamw(*pointers, ctypes.addressof(table), *numbers)
        return
    own = np.ascontiguousarray(np.stack([each.reshape(-1) for each in keys]))
    assert own.shape == (len(steps), items) and own.dtype == np.uint64, (own.shape, items)
    found.adamw_half(*pointers, own.ctypes.data, ctypes.addressof(table), *numbers)
