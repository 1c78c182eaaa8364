"""Rows as Triton kernels, for CUDA: what happens to them between matrix products, in one pass over memory.

Legend: T or N rows, B sequences, S their length, H heads, K head width, D model width, F expert width; ROWS, WIDE are the sides
of a tile.

The interface is that of `rows`, for float32 and bfloat16. Every number is computed in float32 and rounded once, when it is
stored; PyTorch's operations round after each. A row's sums are added up by one program in an order that depends on its width
alone, so a row's bits do not depend on how many others there are. There are no atomics, and nothing travels to the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedmoe_ds.kernels.device_kernels import PINNED

TILE = 1024
"""Numbers of a tile: eight for each thread of four warps."""


@triton.jit
def norm_rows(
    x: tl.tensor,
    w: tl.tensor,
    y: tl.tensor,
    inverse: tl.tensor,
    eps: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """y = w x / sqrt(mean(x^2) + eps); `inverse` [T] keeps 1 / sqrt(...)."""
    t, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDE)
    # 64 bits: a pass of long sequences has more than 2^31 numbers.
    row = t.to(tl.int64)[:, None] * width
    sum_T = tl.zeros((ROWS,), tl.float32)
    for left in range(0, width, WIDE):
        inside = (t[:, None] < rows) & (left + d[None, :] < width)
        x_TD = tl.load(x + row + left + d[None, :], mask=inside, other=0.0).to(tl.float32)
        sum_T += tl.sum(x_TD * x_TD, 1)
    scale_T = 1.0 / tl.sqrt_rn(sum_T / width + eps)
    tl.store(inverse + t, scale_T, mask=t < rows)
    # A second look at the row, which is still in the cache.
    for left in range(0, width, WIDE):
        inside = (t[:, None] < rows) & (left + d[None, :] < width)
        x_TD = tl.load(x + row + left + d[None, :], mask=inside, other=0.0).to(tl.float32)
        w_D = tl.load(w + left + d, mask=left + d < width, other=0.0).to(tl.float32)
        tl.store(y + row + left + d[None, :], (w_D[None, :] * (x_TD * scale_T[:, None])).to(y.dtype.element_ty), mask=inside)


@triton.jit
def norm_rows_back(
    dy: tl.tensor,
    x: tl.tensor,
    w: tl.tensor,
    inverse: tl.tensor,
    dx: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """dx = r (w dy - n mean(w dy n)), with r = `inverse` and n = r x."""
    t, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDE)
    row = t.to(tl.int64)[:, None] * width
    scale_T = tl.load(inverse + t, mask=t < rows, other=0.0)
    sum_T = tl.zeros((ROWS,), tl.float32)
    for left in range(0, width, WIDE):
        inside = (t[:, None] < rows) & (left + d[None, :] < width)
        n_TD = tl.load(x + row + left + d[None, :], mask=inside, other=0.0).to(tl.float32) * scale_T[:, None]
        w_D = tl.load(w + left + d, mask=left + d < width, other=0.0).to(tl.float32)
        dn_TD = tl.load(dy + row + left + d[None, :], mask=inside, other=0.0).to(tl.float32) * w_D[None, :]
        sum_T += tl.sum(dn_TD * n_TD, 1)
    mean_T = sum_T / width
    for left in range(0, width, WIDE):
        inside = (t[:, None] < rows) & (left + d[None, :] < width)
        n_TD = tl.load(x + row + left + d[None, :], mask=inside, other=0.0).to(tl.float32) * scale_T[:, None]
        w_D = tl.load(w + left + d, mask=left + d < width, other=0.0).to(tl.float32)
        dn_TD = tl.load(dy + row + left + d[None, :], mask=inside, other=0.0).to(tl.float32) * w_D[None, :]
        dx_TD = scale_T[:, None] * (dn_TD - n_TD * mean_T[:, None])
        tl.store(dx + row + left + d[None, :], dx_TD.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def rotate_heads(
    x: tl.tensor,
    cosine: tl.tensor,
    sine: tl.tensor,
    y: tl.tensor,
    length: tl.tensor,
    heads: tl.tensor,
    half: tl.tensor,
    x_batch: tl.tensor,
    x_head: tl.tensor,
    x_row: tl.tensor,
    c_batch: tl.tensor,
    c_row: tl.tensor,
    BACK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """Halves (a, b) of each head become (a cos - b sin, b cos + a sin), or with BACK the gradient of that.

    Program t has one token and reads its angles once for all heads. y is dense [B, S, H, K]; x lies as its strides say.
    """
    t = tl.program_id(0)
    batch, place = (t // length).to(tl.int64), (t % length).to(tl.int64)
    k = tl.arange(0, WIDE)
    turn = batch * c_batch + place * c_row
    # Each half has angles of its own, as in the function that this replaces: they are equal in most models, not in all.
    cos_a = tl.load(cosine + turn + k, mask=k < half, other=0.0).to(tl.float32)[None, :]
    cos_b = tl.load(cosine + turn + half + k, mask=k < half, other=0.0).to(tl.float32)[None, :]
    sin_a = tl.load(sine + turn + k, mask=k < half, other=0.0).to(tl.float32)[None, :]
    sin_b = tl.load(sine + turn + half + k, mask=k < half, other=0.0).to(tl.float32)[None, :]
    for first in range(0, heads, ROWS):
        # 64 bits: x may lie head by head, and a head of a long sequence is far from the next.
        h = (first + tl.arange(0, ROWS)).to(tl.int64)
        inside = (h[:, None] < heads) & (k[None, :] < half)
        read = x + batch * x_batch + place * x_row + h[:, None] * x_head + k[None, :]
        a = tl.load(read, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(read + half, mask=inside, other=0.0).to(tl.float32)
        if BACK:
            # The transpose of the map: sines change places and sign.
            new_a, new_b = a * cos_a + b * sin_b, b * cos_b - a * sin_a
        else:
            new_a, new_b = a * cos_a - b * sin_a, b * cos_b + a * sin_b
        write = y + (t.to(tl.int64) * heads + h[:, None]) * 2 * half + k[None, :]
        tl.store(write, new_a.to(y.dtype.element_ty), mask=inside)
        tl.store(write + half, new_b.to(y.dtype.element_ty), mask=inside)


@triton.jit
def gate_rows(
    h: tl.tensor,
    p: tl.tensor,
    pa: tl.tensor,
    slope: tl.tensor,
    cubic: tl.tensor,
    shift: tl.tensor,
    limit: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    PLAIN: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """pa = p g sigmoid(z) u (see `gate_parts`), from h [N, 2F] with the gate's half first."""
    n, f = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    inside, row = (n[:, None] < rows) & (f[None, :] < width), n.to(tl.int64)[:, None] * width
    read = h + 2 * row + f[None, :]
    gate = tl.load(read, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(read + width, mask=inside, other=0.0).to(tl.float32)
    g, u, share, _ = gate_parts(gate, up, slope, cubic, shift, limit, PLAIN)
    p_N = tl.load(p + n, mask=n < rows, other=0.0).to(tl.float32)
    tl.store(pa + row + f[None, :], (p_N[:, None] * (g * share * u)).to(pa.dtype.element_ty), mask=inside)


@triton.jit
def gate_rows_back(
    h: tl.tensor,
    p: tl.tensor,
    dpa: tl.tensor,
    dh: tl.tensor,
    dp: tl.tensor,
    slope: tl.tensor,
    cubic: tl.tensor,
    shift: tl.tensor,
    limit: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    PLAIN: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """dh [N, 2F] and dp [N] from dpa [N, F]. A program has whole rows: dp is a sum over them."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = n.to(tl.int64)[:, None] * width
    p_N = tl.load(p + n, mask=n < rows, other=0.0).to(tl.float32)
    sum_N = tl.zeros((ROWS,), tl.float32)
    for left in range(0, width, WIDE):
        f = left + tl.arange(0, WIDE)
        inside, place = (n[:, None] < rows) & (f[None, :] < width), 2 * row + f[None, :]
        gate = tl.load(h + place, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(h + place + width, mask=inside, other=0.0).to(tl.float32)
        g, u, share, steep = gate_parts(gate, up, slope, cubic, shift, limit, PLAIN)
        dpa_NF = tl.load(dpa + row + f[None, :], mask=inside, other=0.0).to(tl.float32)
        sum_N += tl.sum(dpa_NF * (g * share * u), 1)
        da = dpa_NF * p_N[:, None]
        dgate, dup = da * u * (share + g * share * (1.0 - share) * steep), da * g * share
        if not PLAIN:
            # What a limit cut off has no gradient; at the limit itself it passes, as in torch.clamp.
            dgate, dup = tl.where(gate > limit, 0.0, dgate), tl.where(tl.abs(up) > limit, 0.0, dup)
        tl.store(dh + place, dgate.to(dh.dtype.element_ty), mask=inside)
        tl.store(dh + place + width, dup.to(dh.dtype.element_ty), mask=inside)
    tl.store(dp + n, sum_N.to(dp.dtype.element_ty), mask=n < rows)


@triton.jit
def gate_parts(
    gate: tl.tensor,
    up: tl.tensor,
    slope: tl.tensor,
    cubic: tl.tensor,
    shift: tl.tensor,
    limit: tl.tensor,
    PLAIN: tl.constexpr,
) -> tl.tensor:
    """g, u, sigmoid(z) and dz/dg of `GatedUnit`: z = g (slope + cubic g^2), g and u within their limit, u shifted."""
    g, u, z, steep = gate, up, gate, 1.0
    if not PLAIN:
        # By `where`, not min and max: what is not a number stays so.
        g = tl.where(gate > limit, limit, gate)
        u = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up)) + shift
        z, steep = g * (slope + cubic * g * g), slope + 3.0 * cubic * g * g
    return g, u, tl.sigmoid(z), steep


SWIGLU = (1.0, 0.0, 0.0, float("inf"))


def norm(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `rows.norm`; the weight may have another type than the rows."""
    width = x.shape[-1]
    y, inverse = torch.empty_like(x), x.new_empty(x.numel() // width, dtype=torch.float32)
    if x.numel():
        _check(x, weight_D)
        norm_rows[_by_rows(inverse, width)](x, weight_D, y, inverse, float(eps), inverse.numel(), width, **_options(width))
    return y, inverse


def norm_backward(dy: Tensor, x: Tensor, weight_D: Tensor, inverse: Tensor) -> Tensor:
    """As `rows.norm_backward`."""
    width, dx = x.shape[-1], torch.empty_like(x)
    if x.numel():
        _check(dy, x, weight_D, inverse)
        norm_rows_back[_by_rows(inverse, width)](dy, x, weight_D, inverse, dx, inverse.numel(), width, **_options(width))
    return dx


def rotate(x_BSHK: Tensor, cosine_BSK: Tensor, sine_BSK: Tensor, back: bool = False) -> Tensor:
    """As `rows_on_device.rotate`: the result is dense; x, cosine and sine may be views whose last axis is dense."""
    batch, length, heads, width = x_BSHK.shape
    y_BSHK = torch.empty_like(x_BSHK, memory_format=torch.contiguous_format)
    if x_BSHK.numel():
        assert width % 2 == 0 and x_BSHK.stride(3) == cosine_BSK.stride(2) == sine_BSK.stride(2) == 1, x_BSHK.stride()
        assert cosine_BSK.shape == sine_BSK.shape == (batch, length, width) and cosine_BSK.stride() == sine_BSK.stride()
        strides = (x_BSHK.stride(0), x_BSHK.stride(2), x_BSHK.stride(1), *cosine_BSK.stride()[:2])
        wide = triton.next_power_of_2(width // 2)
        sides = {"ROWS": max(1, min(TILE // wide, triton.next_power_of_2(heads))), "WIDE": wide}
        tensors = (x_BSHK, cosine_BSK, sine_BSK, y_BSHK)
        rotate_heads[(batch * length,)](*tensors, length, heads, width // 2, *strides, BACK=back, **sides, **PINNED)
    return y_BSHK


def gated(h_N2F: Tensor, p_N: Tensor, shape: tuple[float, float, float, float] = SWIGLU) -> Tensor:
    """As `rows.gated`."""
    # A product's rows may be padded where widths are odd: torch aligns them to 16 bytes.
    h_N2F, p_N = h_N2F.contiguous(), p_N.contiguous()
    rows, width = h_N2F.shape[0], h_N2F.shape[1] // 2
    pa_NF = h_N2F.new_empty(rows, width)
    if pa_NF.numel():
        _check(h_N2F, p_N)
        sides = tile(width)
        grid = (triton.cdiv(rows, sides["ROWS"]), triton.cdiv(width, sides["WIDE"]))
        gate_rows[grid](h_N2F, p_N, pa_NF, *map(float, shape), rows, width, PLAIN=shape == SWIGLU, **sides, **PINNED)
    return pa_NF


def gated_backward(
    h_N2F: Tensor, p_N: Tensor, dpa_NF: Tensor, shape: tuple[float, float, float, float] = SWIGLU
) -> tuple[Tensor, Tensor]:
    """As `rows.gated_backward`."""
    h_N2F, p_N, dpa_NF = h_N2F.contiguous(), p_N.contiguous(), dpa_NF.contiguous()
    dh_N2F, dp_N = torch.empty_like(h_N2F), torch.empty_like(p_N)
    rows, width = dpa_NF.shape
    if dpa_NF.numel():
        _check(h_N2F, p_N, dpa_NF)
        tensors = (h_N2F, p_N, dpa_NF, dh_N2F, dp_N)
        gate_rows_back[_by_rows(p_N, width)](
            *tensors, *map(float, shape), rows, width, PLAIN=shape == SWIGLU, **_options(width)
        )
    return dh_N2F, dp_N


swiglu, swiglu_backward = gated, gated_backward
"""As in `rows`: without a shape, a gated unit is SwiGLU."""


def tile(width: int) -> dict[str, int]:
    """The sides of a kernel's tiles: narrow rows share a program."""
    wide = min(TILE, triton.next_power_of_2(width))
    return {"ROWS": TILE // wide, "WIDE": wide}


def _options(width: int) -> dict[str, int]:
    return tile(width) | PINNED


def _by_rows(per_row: Tensor, width: int) -> tuple[int]:
    return (triton.cdiv(per_row.numel(), tile(width)["ROWS"]),)


def _check(*tensors: Tensor) -> None:
    # Kernels see pointers only: another stride would not fail, it would read other numbers.
    for tensor in tensors:
        assert tensor.is_contiguous() and tensor.dtype in (torch.float32, torch.bfloat16), (tensor.stride(), tensor.dtype)
