"""Grouped matrix products: one product per contiguous group of rows.

Legend: N rows, G groups, I input width, O output width, [A, B] one of the two orders of a weight.

`torch.nn.functional.grouped_mm` takes float32, bfloat16 and float16, both sides alike. On CUDA it is one launch where
`device_kernels.torch_groups` says so; elsewhere it would loop over the groups, and Triton's kernels multiply where they are at
hand. The last end is the number of rows: torch leaves rows behind it uninitialised, and so do the loops here.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedmoe_ds.kernels import matrix
from fedmoe_ds.kernels.device_kernels import CUDA_GROUPS, TRITON, aligned, grouped_by
from fedmoe_ds.kernels.groups import Groups


def grouped_mm(x_NI: Tensor, weight_GOI: Tensor, groups: Groups, ours: bool = True) -> Tensor:
    """y = x W_g^T for the rows of each group. Returns [N, O] in the type of the rows; `ours`: Triton's kernels may multiply."""
    return _rows_by_weights(x_NI, weight_GOI, groups, True, ours)


def grouped_mm_t(x_NO: Tensor, weight_GOI: Tensor, groups: Groups, ours: bool = True) -> Tensor:
    """y = x W_g for the rows of each group (the gradient of `grouped_mm` for its rows). Returns [N, I]."""
    return _rows_by_weights(x_NO, weight_GOI, groups, False, ours)


def grouped_outer(y_NO: Tensor, x_NI: Tensor, groups: Groups) -> Tensor:
    """Y_g^T X_g for each group (the gradient of `grouped_mm` for its weights). Returns [G, O, I]; zero for empty groups."""
    if groups.rows and aligned(y_NO.shape[1], y_NO.dtype) and aligned(x_NI.shape[1], x_NI.dtype):
        return products_over_rows(y_NO, x_NI, groups, _most_groups(y_NO.device))
    out_GOI = y_NO.new_zeros(len(groups), y_NO.shape[1], x_NI.shape[1])
    for group, (start, stop) in enumerate(_spans(groups)):
        torch.mm(y_NO[start:stop].t(), x_NI[start:stop], out=out_GOI[group])
    return out_GOI


def add_outer_(out_GOI: Tensor, y_NO: Tensor, x_NI: Tensor, groups: Groups, ours: bool = True) -> None:
    """out_g += Y_g^T X_g for each group; `out` is float32 and may be a client's slice of a bank."""
    kernels = _triton_kernels(y_NO, (y_NO.shape[1], x_NI.shape[1]), groups) if ours else None
    if kernels is not None:
        kernels.add_outer_(out_GOI, y_NO, x_NI, groups)
    elif groups.rows:
        # torch's kernel cannot add to its target, so the products exist for a moment.
        out_GOI.add_(grouped_outer(y_NO, x_NI, groups))


def _rows_by_weights(x_NI: Tensor, weight_GAB: Tensor, groups: Groups, transposed: bool, ours: bool) -> Tensor:
    # First the kernel whose rows do not depend on each other; it takes bfloat16 weights with float32 rows, torch does not.
    y_NO = matrix.grouped_product(x_NI, weight_GAB, groups.ends_G, transposed)
    if y_NO is not None:
        return y_NO
    weight_GIO = weight_GAB.mT if transposed else weight_GAB
    wide_out = weight_GIO.shape[2]
    # An idle rank comes here like the others; kernels on a device are not promised to take nothing.
    if groups.rows == 0:
        return x_NI.new_empty(0, wide_out)
    kernels = _triton_kernels(x_NI, (x_NI.shape[1], wide_out), groups) if ours else None
    if kernels is not None:
        product: Tensor = kernels.rows_by_weights(x_NI, weight_GIO, groups)
        return product
    # Converted as it lies, and turned afterwards: the layout decides which of torch's kernels multiplies.
    weight_GAB = weight_GAB.to(x_NI.dtype)
    weight_GIO = weight_GAB.mT if transposed else weight_GAB
    if aligned(x_NI.shape[1], x_NI.dtype) and aligned(wide_out, x_NI.dtype):
        return products_of_rows(x_NI, weight_GIO, groups, _most_groups(x_NI.device))
    y_NO = x_NI.new_empty(x_NI.shape[0], wide_out)
    # A loop over groups where a row is no multiple of 16 bytes: slower, but of any width.
    for group, (start, stop) in enumerate(_spans(groups)):
        torch.mm(x_NI[start:stop], weight_GIO[group], out=y_NO[start:stop])
    return y_NO


def products_of_rows(x_NI: Tensor, weight_GIO: Tensor, groups: Groups, most: int) -> Tensor:
    """x W_g through torch's grouped kernel, at most `most` groups at a time."""
    if len(groups) <= most:
        return F.grouped_mm(x_NI, weight_GIO, offs=groups.ends_G)
    y_NO = x_NI.new_empty(x_NI.shape[0], weight_GIO.shape[2])
    for chunk, rows in groups.chunks(most):
        # Ends count from the chunk's first row, because torch sees this chunk alone.
        y_NO[rows] = F.grouped_mm(x_NI[rows], weight_GIO[chunk], offs=groups.ends_G[chunk] - rows.start)
    return y_NO


def products_over_rows(y_NO: Tensor, x_NI: Tensor, groups: Groups, most: int) -> Tensor:
    """Y_g^T X_g through torch's grouped kernel, at most `most` groups at a time; zero for empty groups."""
    if len(groups) <= most:
        out_GOI = F.grouped_mm(y_NO.t(), x_NI, offs=groups.ends_G)
    else:
        # Zeros: chunks without rows are skipped below, and their groups' gradients are zero.
        out_GOI = y_NO.new_zeros(len(groups), y_NO.shape[1], x_NI.shape[1])
        for chunk, rows in groups.chunks(most):
            out_GOI[chunk] = F.grouped_mm(y_NO[rows].t(), x_NI[rows], offs=groups.ends_G[chunk] - rows.start)
    # On Blackwell torch does not write what belongs to a group without rows (pytorch issue 172439).
    return out_GOI if y_NO.device.type == "cpu" else out_GOI.masked_fill_(groups.empty_G[:, None, None], 0.0)


def _triton_kernels(x: Tensor, widths: tuple[int, int], groups: Groups) -> Any:
    """The module of Triton's kernels where they serve and torch has nothing in one launch, else None."""
    if x.device.type != "cuda" or grouped_by(x.dtype, x.device, widths, len(groups)) != TRITON:
        return None
    from fedmoe_ds.kernels import grouped_triton  # Triton is there only with CUDA builds of torch

    return grouped_triton


def _most_groups(device: torch.device) -> int:
    return CUDA_GROUPS if device.type == "cuda" else sys.maxsize


def _spans(groups: Groups) -> list[tuple[int, int]]:
    ends = groups.bounds(1)
    return list(zip([0, *ends[:-1]], ends, strict=True))
