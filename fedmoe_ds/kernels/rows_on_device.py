"""Rows on a GPU: by Triton's kernels where they can run, else by PyTorch's operations; float32 and bfloat16.

Legend: T rows, B sequences, S their length, H heads, K head width, D model width.

Either way sums are float32 and a number is rounded once, from float32, when it is returned. transformers' own layers round a
bfloat16 row of a norm twice and a rotated head three times, so these are closer to float32 than what they replace.
"""

from __future__ import annotations

import functools
import importlib.util
import shutil
from types import ModuleType

import torch
from torch import Tensor

TYPES = (torch.float32, torch.bfloat16)


def serves(*tensors: Tensor) -> bool:
    """Whether the functions below take these tensors: rows on one kind of device, of one type."""
    first = tensors[0]
    return first.dtype in TYPES and all(t.device.type == "cuda" and t.dtype == first.dtype for t in tensors)


@functools.cache
def compiles() -> bool:
    """Whether Triton's kernels can be compiled and run for CUDA in this process.

    A device alone does not say so: torch may have been built without CUDA's runtime, Triton may be missing, and it builds its
    launchers with a C compiler.
    """
    if torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        return False
    return any(shutil.which(compiler) for compiler in ("cc", "gcc", "clang"))


def kernels(tensor: Tensor) -> ModuleType | None:
    """`rows_triton` for a tensor on a CUDA device where that can run, else None."""
    if tensor.device.type != "cuda" or tensor.dtype not in TYPES or not compiles():
        return None
    from fedmoe_ds.kernels import rows_triton  # Triton is there only with CUDA builds of torch

    return rows_triton


def norm(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMS norm over the last axis, as `rows.norm`: y like x, and 1 / rms per row in float32."""
    compiled = kernels(x)
    if compiled is not None:
        return compiled.norm(x, weight_D, eps)  # type: ignore[no-any-return]
    wide = x.float()
    inverse = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (wide * inverse).mul_(weight_D).to(x.dtype), inverse.flatten()


def norm_backward(dy: Tensor, x: Tensor, weight_D: Tensor, inverse: Tensor) -> Tensor:
    """The gradient of `norm` for x."""
    compiled = kernels(x)
    if compiled is not None:
        return compiled.norm_backward(dy, x, weight_D, inverse)  # type: ignore[no-any-return]
    scale = inverse.view(*x.shape[:-1], 1)
    normed, slope = x * scale, dy * weight_D.float()
    return slope.addcmul_(normed, (slope * normed).mean(-1, keepdim=True), value=-1).mul_(scale).to(x.dtype)


def rotate(x_BSHK: Tensor, cosine_BSK: Tensor, sine_BSK: Tensor, back: bool = False) -> Tensor:
    """Rotary position embedding with rotated halves, or its gradient with `back`; dense, whatever x's strides are.

    Cosine and sine may be one row for all sequences (a view with stride 0).
    """
    compiled = kernels(x_BSHK)
    if compiled is not None:
        dense_BSHK = x_BSHK if x_BSHK.stride(-1) == 1 else x_BSHK.contiguous()
        return compiled.rotate(dense_BSHK, cosine_BSK, sine_BSK, back)  # type: ignore[no-any-return]
    half, sign = x_BSHK.shape[-1] // 2, -1.0 if back else 1.0
    cosine, sine, (a, b) = cosine_BSK.unsqueeze(2), sine_BSK.unsqueeze(2), x_BSHK.chunk(2, -1)
    # The transpose of the map takes the sine of each half to the other one, with the other sign.
    sine_a, sine_b = (sine[..., half:], sine[..., :half]) if back else (sine[..., :half], sine[..., half:])
    y_BSHK = x_BSHK.to(torch.float32, memory_format=torch.contiguous_format, copy=True).mul_(cosine)
    y_BSHK[..., :half].addcmul_(b, sine_a, value=-sign)
    y_BSHK[..., half:].addcmul_(a, sine_b, value=sign)
    return y_BSHK.to(x_BSHK.dtype)
