"""Grouped matrix products: one product per contiguous group of rows.

Legend: N rows, G groups, I input width, O output width.

`torch.nn.functional.grouped_mm` takes float32, bfloat16 and float16, both sides alike. On CUDA it is one launch for bfloat16 on
sm_90 and newer; for other types and older devices it loops over the groups inside torch, after copying their ends to the host.
The last end is the number of rows: torch leaves rows behind it uninitialised, and so do the loops here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fedmoe_ds.kernels import matrix

# torch.nn.functional.grouped_mm reads every matrix through 16-byte aligned strides.
_ALIGNMENT_BYTES = 16

# On CUDA it takes fewer than 1024 groups: one thread of a block prepares each.
CUDA_GROUPS = 1023


def aligned(width: int, dtype: torch.dtype) -> bool:
    """Whether rows of this width can go through torch's grouped kernel."""
    return width * dtype.itemsize % _ALIGNMENT_BYTES == 0


def grouped_mm(x_NI: Tensor, weight_GOI: Tensor, ends_G: Tensor) -> Tensor:
    """y = x W_g^T for the rows of each group; `ends_G` (int32) are the groups' end rows. Returns [N, O]."""
    # First the kernel whose rows do not depend on each other; it takes bfloat16 weights with float32 rows, torch does not.
    y_NO = matrix.grouped_product(x_NI, weight_GOI, ends_G, transposed=True)
    if y_NO is not None:
        return y_NO
    weight_GOI = weight_GOI.to(x_NI.dtype)
    if aligned(x_NI.shape[1], x_NI.dtype) and aligned(weight_GOI.shape[1], x_NI.dtype):
        return products_of_rows(x_NI, weight_GOI.transpose(-2, -1), ends_G, _most_groups(x_NI.device))
    y_NO = x_NI.new_empty(x_NI.shape[0], weight_GOI.shape[1])
    # A loop over groups where a row is no multiple of 16 bytes: slower, but of any width.
    for group, (start, stop) in enumerate(_spans(ends_G)):
        torch.mm(x_NI[start:stop], weight_GOI[group].t(), out=y_NO[start:stop])
    return y_NO


def grouped_mm_t(x_NO: Tensor, weight_GOI: Tensor, ends_G: Tensor) -> Tensor:
    """y = x W_g for the rows of each group (the gradient of `grouped_mm` for its rows). Returns [N, I]."""
    y_NI = matrix.grouped_product(x_NO, weight_GOI, ends_G, transposed=False)
    if y_NI is not None:
        return y_NI
    weight_GOI = weight_GOI.to(x_NO.dtype)
    if aligned(x_NO.shape[1], x_NO.dtype) and aligned(weight_GOI.shape[2], x_NO.dtype):
        return products_of_rows(x_NO, weight_GOI, ends_G, _most_groups(x_NO.device))
    y_NI = x_NO.new_empty(x_NO.shape[0], weight_GOI.shape[2])
    for group, (start, stop) in enumerate(_spans(ends_G)):
        torch.mm(x_NO[start:stop], weight_GOI[group], out=y_NI[start:stop])
    return y_NI


def grouped_outer(y_NO: Tensor, x_NI: Tensor, ends_G: Tensor) -> Tensor:
    """Y_g^T X_g for each group (the gradient of `grouped_mm` for its weights). Returns [G, O, I]; zero for empty groups."""
    if aligned(y_NO.shape[1], y_NO.dtype) and aligned(x_NI.shape[1], x_NI.dtype):
        return products_over_rows(y_NO, x_NI, ends_G, _most_groups(y_NO.device))
    out_GOI = y_NO.new_zeros(ends_G.shape[0], y_NO.shape[1], x_NI.shape[1])
    for group, (start, stop) in enumerate(_spans(ends_G)):
        torch.mm(y_NO[start:stop].t(), x_NI[start:stop], out=out_GOI[group])
    return out_GOI


def products_of_rows(x_NI: Tensor, weight_GIO: Tensor, ends_G: Tensor, most: int) -> Tensor:
    """x W_g through torch's grouped kernel, at most `most` groups at a time."""
    if ends_G.shape[0] <= most:
        return F.grouped_mm(x_NI, weight_GIO, offs=ends_G)
    y_NO = x_NI.new_empty(x_NI.shape[0], weight_GIO.shape[2])
    for groups, rows in _chunks(ends_G, most):
        # Ends count from the chunk's first row, because torch sees this chunk alone.
        y_NO[rows] = F.grouped_mm(x_NI[rows], weight_GIO[groups], offs=ends_G[groups] - rows.start)
    return y_NO


def products_over_rows(y_NO: Tensor, x_NI: Tensor, ends_G: Tensor, most: int) -> Tensor:
    """Y_g^T X_g through torch's grouped kernel, at most `most` groups at a time."""
    if ends_G.shape[0] <= most:
        return F.grouped_mm(y_NO.t(), x_NI, offs=ends_G)
    # Zeros: chunks without rows are skipped below, and their groups' gradients are zero.
    out_GOI = y_NO.new_zeros(ends_G.shape[0], y_NO.shape[1], x_NI.shape[1])
    for groups, rows in _chunks(ends_G, most):
        out_GOI[groups] = F.grouped_mm(y_NO[rows].t(), x_NI[rows], offs=ends_G[groups] - rows.start)
    return out_GOI


def _most_groups(device: torch.device) -> int:
    return CUDA_GROUPS if device.type == "cuda" else sys.maxsize


def _chunks(ends_G: Tensor, most: int) -> Iterator[tuple[slice, slice]]:
    """(groups, their rows) of every chunk that has rows. Rows are cut on the host, so this waits for the device."""
    count = ends_G.shape[0]
    # One transfer for all chunks: only the last end of each decides where rows are cut.
    lasts = [*range(most - 1, count - 1, most), count - 1]
    start = 0
    for first, stop in zip(range(0, count, most), ends_G[lasts].tolist(), strict=True):
        if stop > start:
            yield slice(first, first + most), slice(start, stop)
        start = stop


def _spans(ends_G: Tensor) -> list[tuple[int, int]]:
    ends = ends_G.tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))
