"""LoRA products of row groups as Triton kernels, for CUDA.

Legend: N rows, G groups, W a width (input or output), R adapter rank; ROWS, WIDE, RANK are the sides of a tile.

B [G, O, R] is read as its transpose, so that both factors are V [G, R, W] and differ in strides alone. Six products are then
three kernels: rows to rank (m = s x V_g^T), rank to rows (y += m V_g), and a group's sum over rows (dV_g += m^T x).

Where groups begin is known on the device only. Grids are therefore laid out over groups and not over tiles of rows: nothing
travels to the host, and programs of an empty group end at once. Every element is written by one program that adds up in one
order, so there are no atomics, and a group's bits depend on its own rows alone. Factors come in the rows' type (a bank keeps a
copy) or in float32, and are then rounded before a product; sums are float32, and so are the gradients they are added to.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedmoe_ds.kernels.device_kernels import PINNED, TRITON
from fedmoe_ds.kernels.groups import Groups, Scale

ROWS, WIDE, LEAST_RANK = 32, 64, 16
"""Tiles: groups have tens of rows, and tl.dot wants sides of at least 16."""
GRID = 65_535
"""CUDA's limit on the second and the third side of a grid; the first takes 2^31 - 1 programs."""


@triton.jit
def rows_to_rank(
    x: tl.tensor,
    v: tl.tensor,
    m: tl.tensor,
    ends: tl.tensor,
    scale: tl.tensor,
    scales: tl.tensor,
    width: tl.tensor,
    rank: tl.tensor,
    x_row: tl.tensor,
    v_group: tl.tensor,
    v_rank: tl.tensor,
    v_wide: tl.tensor,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    RANK: tl.constexpr,
) -> None:
    """m = s_g x V_g^T; s_g is `scales[g]`, or `scale` without. Program (g, j) takes every J-th tile of the group's rows."""
    group = tl.program_id(0)
    start, stop = group_span(ends, group)
    if scales is not None:
        scale = tl.load(scales + group)
    # 64 bits: a group's offset in a bank of all clients can exceed 2^31 numbers.
    v += group.to(tl.int64) * v_group
    r = tl.arange(0, RANK)
    # The host knows the average group only; a program steps through as many tiles as its own group has.
    for first in range(start + tl.program_id(1) * ROWS, stop, tl.num_programs(1) * ROWS):
        n = (first + tl.arange(0, ROWS)).to(tl.int64)
        sum_NR = tl.zeros((ROWS, RANK), tl.float32)
        # Widths and ranks need not fill their tiles: masked places load as zero and add nothing.
        for left in range(0, width, WIDE):
            w = left + tl.arange(0, WIDE)
            x_NW = tl.load(x + n[:, None] * x_row + w[None, :], mask=(n[:, None] < stop) & (w[None, :] < width), other=0.0)
            v_places = v + w[:, None] * v_wide + r[None, :] * v_rank
            v_WR = tl.load(v_places, mask=(w[:, None] < width) & (r[None, :] < rank), other=0.0)
            # ieee: tl.dot would take TF32 for float32 rows, which keeps 10 bits of the fraction.
            sum_NR = tl.dot(x_NW, v_WR.to(x_NW.dtype), sum_NR, input_precision="ieee")
        m_NR = (sum_NR * scale).to(m.dtype.element_ty)
        tl.store(m + n[:, None] * rank + r[None, :], m_NR, mask=(n[:, None] < stop) & (r[None, :] < rank))


@triton.jit
def rank_to_rows(
    y: tl.tensor,
    m: tl.tensor,
    v: tl.tensor,
    ends: tl.tensor,
    width: tl.tensor,
    rank: tl.tensor,
    y_row: tl.tensor,
    v_group: tl.tensor,
    v_rank: tl.tensor,
    v_wide: tl.tensor,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    RANK: tl.constexpr,
) -> None:
    """y += m V_g. Program (g, c, j) keeps one block of columns of V_g and takes every J-th tile of the group's rows."""
    group = tl.program_id(0)
    start, stop = group_span(ends, group)
    # An empty group reads no weights.
    if start == stop:
        return
    r, w = tl.arange(0, RANK), tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    v_places = v + group.to(tl.int64) * v_group + r[:, None] * v_rank + w[None, :] * v_wide
    v_RW = tl.load(v_places, mask=(r[:, None] < rank) & (w[None, :] < width), other=0.0)
    v_RW = v_RW.to(m.dtype.element_ty)
    for first in range(start + tl.program_id(2) * ROWS, stop, tl.num_programs(2) * ROWS):
        n = (first + tl.arange(0, ROWS)).to(tl.int64)
        m_NR = tl.load(m + n[:, None] * rank + r[None, :], mask=(n[:, None] < stop) & (r[None, :] < rank), other=0.0)
        y_places, inside = y + n[:, None] * y_row + w[None, :], (n[:, None] < stop) & (w[None, :] < width)
        # The target starts the sum, in float32, and is rounded once at the end.
        y_NW = tl.load(y_places, mask=inside, other=0.0).to(tl.float32)
        y_NW = tl.dot(m_NR, v_RW, y_NW, input_precision="ieee")
        tl.store(y_places, y_NW.to(y.dtype.element_ty), mask=inside)


@triton.jit
def sum_over_rows(
    dv: tl.tensor,
    m: tl.tensor,
    x: tl.tensor,
    ends: tl.tensor,
    width: tl.tensor,
    rank: tl.tensor,
    x_row: tl.tensor,
    dv_group: tl.tensor,
    dv_rank: tl.tensor,
    dv_wide: tl.tensor,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    RANK: tl.constexpr,
) -> None:
    """dV_g += m^T x. Program (g, c) adds up one block of columns over the group's rows, in their order."""
    group = tl.program_id(0)
    start, stop = group_span(ends, group)
    if start == stop:
        return
    r, w = tl.arange(0, RANK), tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    sum_RW = tl.zeros((RANK, WIDE), tl.float32)
    for first in range(start, stop, ROWS):
        n = (first + tl.arange(0, ROWS)).to(tl.int64)
        m_NR = tl.load(m + n[:, None] * rank + r[None, :], mask=(n[:, None] < stop) & (r[None, :] < rank), other=0.0)
        x_NW = tl.load(x + n[:, None] * x_row + w[None, :], mask=(n[:, None] < stop) & (w[None, :] < width), other=0.0)
        sum_RW = tl.dot(tl.trans(m_NR), x_NW, sum_RW, input_precision="ieee")
    places = dv + group.to(tl.int64) * dv_group + r[:, None] * dv_rank + w[None, :] * dv_wide
    inside = (r[:, None] < rank) & (w[None, :] < width)
    # Read, add, write without atomics: no other program has this group and block of columns.
    tl.store(places, tl.load(places, mask=inside, other=0.0) + sum_RW, mask=inside)


@triton.jit
def group_span(ends: tl.tensor, group: tl.tensor) -> tl.tensor:
    """First row of a group, and the row behind its last."""
    # The first group starts at 0; the mask keeps the load before the array from happening.
    return tl.load(ends + group - 1, mask=group > 0, other=0), tl.load(ends + group)


class TritonProducts:
    """Through the kernels above (a `LowRankProducts`)."""

    name = kernel = TRITON

    def project(self, x_NI: Tensor, a_GRI: Tensor, groups: Groups, scale: Scale) -> Tensor:
        return _to_rank(x_NI, a_GRI, groups, scale)

    def expand_(self, y_NO: Tensor, m_NR: Tensor, b_GOR: Tensor, groups: Groups) -> None:
        _to_rows_(y_NO, m_NR, b_GOR.mT, groups)

    def back_project(self, dy_NO: Tensor, b_GOR: Tensor, groups: Groups, scale: Scale) -> Tensor:
        return _to_rank(dy_NO, b_GOR.mT, groups, scale)

    def back_expand_(self, dx_NI: Tensor, dm_NR: Tensor, a_GRI: Tensor, groups: Groups) -> None:
        _to_rows_(dx_NI, dm_NR, a_GRI, groups)

    def grad_a_(self, da_GRI: Tensor, dm_NR: Tensor, x_NI: Tensor, groups: Groups) -> None:
        _sum_(da_GRI, dm_NR, x_NI, groups)

    def grad_b_(self, db_GOR: Tensor, m_NR: Tensor, dy_NO: Tensor, groups: Groups) -> None:
        _sum_(db_GOR.mT, m_NR, dy_NO, groups)


def _to_rank(x_NW: Tensor, v_GRW: Tensor, groups: Groups, scale: Scale) -> Tensor:
    _check(x_NW)
    (count, rank, width), rows = v_GRW.shape, x_NW.shape[0]
    m_NR = x_NW.new_empty(rows, rank)
    if rows and count:
        grid = (count, _row_programs(rows, count))
        strides = (x_NW.stride(0), *v_GRW.stride())
        one, each_G = (scale, None) if isinstance(scale, float) else (1.0, scale)
        rows_to_rank[grid](x_NW, v_GRW, m_NR, groups.ends_G, one, each_G, width, rank, *strides, **tiles(rank), **PINNED)
    return m_NR


def _to_rows_(y_NW: Tensor, m_NR: Tensor, v_GRW: Tensor, groups: Groups) -> None:
    _check(y_NW, m_NR)
    (count, rank, width), rows = v_GRW.shape, y_NW.shape[0]
    if rows and count:
        grid = (count, triton.cdiv(width, WIDE), _row_programs(rows, count))
        strides = (y_NW.stride(0), *v_GRW.stride())
        rank_to_rows[grid](y_NW, m_NR, v_GRW, groups.ends_G, width, rank, *strides, **tiles(rank), **PINNED)


def _sum_(dv_GRW: Tensor, m_NR: Tensor, x_NW: Tensor, groups: Groups) -> None:
    _check(x_NW, m_NR)
    assert dv_GRW.dtype == torch.float32, dv_GRW.dtype
    (count, rank, width), rows = dv_GRW.shape, x_NW.shape[0]
    if rows and count:
        grid = (count, triton.cdiv(width, WIDE))
        strides = (x_NW.stride(0), *dv_GRW.stride())
        sum_over_rows[grid](dv_GRW, m_NR, x_NW, groups.ends_G, width, rank, *strides, **tiles(rank), **PINNED)


def _check(rows_NW: Tensor, m_NR: Tensor | None = None) -> None:
    assert rows_NW.shape[1] == 1 or rows_NW.stride(1) == 1, rows_NW.stride()
    # The kernels address row n of m as n * rank.
    assert m_NR is None or (m_NR.is_contiguous() and m_NR.dtype == rows_NW.dtype), (m_NR.stride(), m_NR.dtype)


def _row_programs(rows: int, groups: int) -> int:
    """Programs that share the rows of a group: one per tile of a group of average size, as far as a grid's side reaches."""
    return min(GRID, max(1, -(-rows // (groups * ROWS))))


def tiles(rank: int) -> dict[str, int]:
    """The sides of a kernel's tiles."""
    return {"ROWS": ROWS, "WIDE": WIDE, "RANK": max(LEAST_RANK, triton.next_power_of_2(rank))}
