"""Grouped matrix products as Triton kernels, for CUDA devices and types that torch has no grouped kernel for.

Legend: N rows, G groups, I input width, O output width; ROWS, WIDE, HIGH, DEEP are the sides of a tile.

Where groups begin is known on the device only, and nothing travels to the host. A product of rows has one program per tile of
rows and block of columns: the host knows how many tiles there are at most, each program finds its own by adding up the groups'
tiles, and those behind the last tile end at once. Groups of any size are thus cut into equal work, and an empty group has no
programs. Every element is written by one program that adds up along one axis in one order: there are no atomics, tiles depend
on types alone and never on the number of rows, and so a row's bits (for outer products a group's) depend on its own rows alone.

Weights may be float32 under bfloat16 rows: they are rounded to the rows' type before a product. Sums are float32, and float32
products are exact to float32 (`input_precision="ieee"`: tl.dot would take TF32, which keeps 10 bits of the fraction).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedmoe_ds.kernels.device_kernels import PINNED
from fedmoe_ds.kernels.groups import Groups


@triton.jit
def product_of_rows(
    x: tl.tensor,
    w: tl.tensor,
    y: tl.tensor,
    ends: tl.tensor,
    groups: tl.tensor,
    wide_in: tl.tensor,
    wide_out: tl.tensor,
    x_row: tl.tensor,
    w_group: tl.tensor,
    w_in: tl.tensor,
    w_out: tl.tensor,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    DEEP: tl.constexpr,
) -> None:
    """y = x W_g. Program p has block p mod B of B blocks of columns, for tile p div B of rows."""
    # Columns first: programs that run at the same time share their rows, and the weights of few groups.
    blocks = tl.cdiv(wide_out, WIDE)
    group, start, stop = tile_of_rows(ends, groups, tl.program_id(0) // blocks, GROUPS, ROWS)
    if start >= stop:
        return
    n = (start + tl.arange(0, ROWS)).to(tl.int64)
    o = (tl.program_id(0) % blocks) * WIDE + tl.arange(0, WIDE)
    # 64 bits: a group's offset in the weights of all experts can exceed 2^31 numbers.
    w += group.to(tl.int64) * w_group
    sum_NO = tl.zeros((ROWS, WIDE), tl.float32)
    # Widths need not fill their tiles: masked places load as zero and add nothing.
    for left in range(0, wide_in, DEEP):
        i = left + tl.arange(0, DEEP)
        x_NI = tl.load(x + n[:, None] * x_row + i[None, :], mask=(n[:, None] < stop) & (i[None, :] < wide_in), other=0.0)
        w_places = w + i[:, None] * w_in + o[None, :] * w_out
        w_IO = tl.load(w_places, mask=(i[:, None] < wide_in) & (o[None, :] < wide_out), other=0.0)
        sum_NO = tl.dot(x_NI, w_IO.to(x_NI.dtype), sum_NO, input_precision="ieee")
    y_places = y + n[:, None] * wide_out + o[None, :]
    tl.store(y_places, sum_NO.to(y.dtype.element_ty), mask=(n[:, None] < stop) & (o[None, :] < wide_out))


@triton.jit
def tile_of_rows(
    ends: tl.tensor, groups: tl.tensor, tile: tl.tensor, GROUPS: tl.constexpr, ROWS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The group of a tile, the tile's first row, and the row behind the group's last; there is no such tile if these meet."""
    g = tl.arange(0, GROUPS)
    stop_G = tl.load(ends + g, mask=g < groups, other=0)
    # The first group starts at 0; the mask keeps the load before the array from happening.
    start_G = tl.load(ends + g - 1, mask=(g > 0) & (g < groups), other=0)
    tiles_G = tl.cdiv(stop_G - start_G, ROWS)
    # Groups whose tiles all come before this one; empty groups have none and are passed over.
    behind_G = tl.cumsum(tiles_G, 0) <= tile
    group = tl.sum(behind_G.to(tl.int32), 0)
    before = tl.sum(tl.where(behind_G, tiles_G, 0), 0)
    # Behind the last tile no group is left: both sums are zero then, and the first row is not before the last.
    start = tl.sum(tl.where(g == group, start_G, 0), 0) + (tile - before) * ROWS
    return group, start, tl.sum(tl.where(g == group, stop_G, 0), 0)


@triton.jit
def product_over_rows(
    out: tl.tensor,
    y: tl.tensor,
    x: tl.tensor,
    ends: tl.tensor,
    wide_out: tl.tensor,
    wide_in: tl.tensor,
    y_row: tl.tensor,
    x_row: tl.tensor,
    out_group: tl.tensor,
    out_row: tl.tensor,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
    DEEP: tl.constexpr,
) -> None:
    """out_g += Y_g^T X_g. Program p has tile p mod B of B tiles of group p div B's matrix, and adds up over all of its rows."""
    columns = tl.cdiv(wide_in, WIDE)
    blocks = tl.cdiv(wide_out, HIGH) * columns
    group, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    start, stop = tl.load(ends + group - 1, mask=group > 0, other=0), tl.load(ends + group)
    # An empty group adds nothing.
    if start == stop:
        return
    o, i = (block // columns) * HIGH + tl.arange(0, HIGH), (block % columns) * WIDE + tl.arange(0, WIDE)
    sum_OI = tl.zeros((HIGH, WIDE), tl.float32)
    for first in range(start, stop, DEEP):
        n = (first + tl.arange(0, DEEP)).to(tl.int64)
        y_NO = tl.load(y + n[:, None] * y_row + o[None, :], mask=(n[:, None] < stop) & (o[None, :] < wide_out), other=0.0)
        x_NI = tl.load(x + n[:, None] * x_row + i[None, :], mask=(n[:, None] < stop) & (i[None, :] < wide_in), other=0.0)
        sum_OI = tl.dot(tl.trans(y_NO), x_NI, sum_OI, input_precision="ieee")
    places = out + group.to(tl.int64) * out_group + o[:, None] * out_row + i[None, :]
    inside = (o[:, None] < wide_out) & (i[None, :] < wide_in)
    # Read, add, write without atomics: no other program has this tile.
    tl.store(places, tl.load(places, mask=inside, other=0.0) + sum_OI, mask=inside)


def rows_by_weights(x_NI: Tensor, weight_GIO: Tensor, groups: Groups) -> Tensor:
    """x W_g for the rows of each group, in the type of the rows; one of the last two strides of the weight is 1. [N, O]."""
    x_NI = x_NI if x_NI.stride(1) == 1 else x_NI.contiguous()
    (count, wide_in, wide_out), rows = weight_GIO.shape, x_NI.shape[0]
    y_NO = x_NI.new_empty(rows, wide_out)
    sides = tiles(x_NI.dtype, weight_GIO.dtype)
    # Every group with rows has at most one tile that is not full.
    most = rows // sides["ROWS"] + min(count, rows)
    if most:
        grid = (most * triton.cdiv(wide_out, sides["WIDE"]),)
        sizes = (count, wide_in, wide_out, x_NI.stride(0), *weight_GIO.stride())
        # At least a warp: sums over less are no gain, and every other number is one more kernel to compile.
        width = max(32, triton.next_power_of_2(count))
        product_of_rows[grid](x_NI, weight_GIO, y_NO, groups.ends_G, *sizes, GROUPS=width, **sides, **PINNED)
    return y_NO


def add_outer_(out_GOI: Tensor, y_NO: Tensor, x_NI: Tensor, groups: Groups) -> None:
    """out_g += Y_g^T X_g for each group, in float32."""
    assert out_GOI.dtype == torch.float32 and out_GOI.stride(2) == 1, (out_GOI.dtype, out_GOI.stride())
    y_NO, x_NI = (rows if rows.stride(1) == 1 else rows.contiguous() for rows in (y_NO, x_NI))
    count, wide_out, wide_in = out_GOI.shape
    if count and y_NO.shape[0]:
        sides = outer_tiles(x_NI.dtype)
        grid = (count * triton.cdiv(wide_out, sides["HIGH"]) * triton.cdiv(wide_in, sides["WIDE"]),)
        sizes = (wide_out, wide_in, y_NO.stride(0), x_NI.stride(0), *out_GOI.stride()[:2])
        product_over_rows[grid](out_GOI, y_NO, x_NI, groups.ends_G, *sizes, **sides, **PINNED)


def tiles(rows: torch.dtype, weights: torch.dtype) -> dict[str, int]:
    """The sides of the tiles of a product of rows. Three stages of them fit into 99 KiB, the shared memory of small GPUs."""
    if rows == torch.float32:
        # Float32 products run outside the matrix units: a smaller tile leaves more programs, and enough registers.
        return {"ROWS": 64, "WIDE": 64, "DEEP": 32}
    return {"ROWS": 64, "WIDE": 128, "DEEP": 32 if weights == torch.float32 else 64}


def outer_tiles(rows: torch.dtype) -> dict[str, int]:
    """The sides of the tiles of an outer product; DEEP rows are added up at a time."""
    return {"HIGH": 64, "WIDE": 64 if rows == torch.float32 else 128, "DEEP": 32}
