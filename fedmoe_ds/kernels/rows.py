"""Rows: what happens to them between matrix products, and the AdamW step of a client, by rows.cpp: float32 on the CPU.

Legend: T or N rows, H heads, K head width, D model width, F expert width.

Callers ask `serves` first and use PyTorch's operations where the answer is no.
"""

from __future__ import annotations

import ctypes
import functools

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
    "adamw": [*[POINTER] * 4, SIZE, SIZE, SIZE, *[FLOAT] * 8],
    "adamw_half": [*[POINTER] * 5, SIZE, SIZE, SIZE, *[FLOAT] * 8],
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


def adamw(
    value: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    item_axes: int,
    *,
    clip: float,
    keep: float,
    betas: tuple[float, float],
    root: float,
    eps: float,
    rate: float,
    keys: NDArray[np.uint64] | None = None,
) -> None:
    """One AdamW step (Loshchilov & Hutter, arXiv 1711.05101) in place, and the gradient is cleared.

    All four tensors have the same shape and strides; the last `item_axes` axes are dense, and the others must be one regular
    sequence (a client's slice of a bank is). `keep` is 1 - lr * decay, `root` sqrt(1 - beta2^t), `rate` lr / (1 - beta1^t).
    With `keys` (`fedmoe_ds.clients.stochastic_rounding`), one per item, moments are bfloat16 and rounded at random; without,
    float32.
    """
    # Numbers of one item; a block without items (no experts here, no layers) has nothing to step.
    size = value[(0,) * (value.dim() - item_axes)].numel() if value.numel() else 0
    if size == 0:
        return
    head = value.shape[: value.dim() - item_axes]
    # A client's slice of a bank: its items lie one stride apart, across layers and experts alike.
    stride = value.stride(len(head) - 1)
    for axis in range(len(head) - 1):
        assert value.stride(axis) == value.stride(axis + 1) * head[axis + 1], "items must be evenly spaced"
    kept = torch.float32 if keys is None else torch.bfloat16
    for tensor, dtype in ((value, torch.float32), (grad, torch.float32), (first, kept), (second, kept)):
        assert tensor.dtype == dtype and tensor.stride() == value.stride() and tensor.shape == value.shape
    pointers = [tensor.data_ptr() for tensor in (value, grad, first, second)]
    items = value.numel() // size
    found = _library()
    assert found is not None, "ask `serves` first"
    # 1 - beta is taken here, in float64: in float32, 1 - beta2 would be off by 5e-5 of itself.
    numbers = (items, stride, size, clip, keep, 1.0 - betas[0], betas[1], 1.0 - betas[1], root, eps, rate)
    if keys is None:
        found.adamw(*pointers, *numbers)
        return
    assert keys.size == items and keys.dtype == np.uint64 and keys.flags.c_contiguous, (keys.shape, items)
    found.adamw_half(*pointers, keys.ctypes.data, *numbers)
