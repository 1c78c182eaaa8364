"""Sums of weighted adapters by sums.cpp: float32 on the CPU.

Legend: N rows that have a weight of their own, W numbers of a row; head and item as in aggregation/exact_sum.py.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from fedmoe_ds.kernels.compiling import library

_KINDS = {torch.int64: "exact", torch.float32: "float"}


def loops_for(value: Tensor) -> Loops | None:
    """The compiled loops where they serve these values (float32 on a CPU with a working g++), else None."""
    if value.device.type != "cpu" or value.dtype != torch.float32:
        return None
    found = _library()
    return None if found is None else Loops(found)


def available() -> bool:
    """Whether the loops could be compiled here."""
    return _library() is not None


def _library() -> ctypes.CDLL | None:
    # Every product and every sum is rounded, as in torch: no contraction into fused operations.
    return library("sums", "-ffp-contract=off")


class Loops:
    """Sums are [2, *head, *item] int64 or [1, *head, *item] float32, contiguous; windows int64 [*head]."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def fold(self, sums: Tensor, windows: Tensor, value: Tensor, weight: Tensor) -> None:
        """Add weight, float64 [*head], times value, float32 [*head, *item]; rows may lie apart. As `Sum.add_product`."""
        weight, rows = weight.contiguous(), _rows(value, weight.dim())
        assert weight.dtype == torch.float64 and sums.is_contiguous() and sums.shape[1:] == value.shape
        # Windows are raised in place by the loop, so the caller's own tensor must go in, not a copy.
        assert windows.dtype == torch.int64 and windows.is_contiguous() and windows.shape == weight.shape
        if self._call("fold", sums, [sums, windows, rows, weight], rows):
            raise ArithmeticError("a weighted value is not finite")

    def mean(self, sums: Tensor, divisor: Tensor, old: Tensor) -> Tensor:
        """float32 [*head, *item]: sums over float64 [*head], both in units of the windows; `old` where that is zero."""
        divisor, rows = divisor.contiguous(), _rows(old, divisor.dim())
        assert divisor.dtype == torch.float64 and sums.is_contiguous() and sums.shape[1:] == old.shape
        # Contiguous whatever the strides of `old` are: a slice of a bank goes in, a tensor of its own comes out.
        result = torch.empty(old.shape)
        self._call("mean", sums, [result, sums, rows, divisor], rows)
        return result

    def _call(self, name: str, sums: Tensor, tensors: list[Tensor], rows: Tensor) -> int:
        # `stride(0)` tells the loop how far rows lie apart; only the sums themselves must be dense.
        sizes = (rows.shape[0], rows.shape[1], rows.stride(0))
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
        function = getattr(self.library, f"{name}_{_KINDS[sums.dtype]}")
        # The default result of ctypes is a 32-bit int.
        function.restype = ctypes.c_int64 if name == "fold" else None
        return function(*pointers, *map(ctypes.c_int64, sizes)) or 0


def _rows(full: Tensor, head: int) -> Tensor:
    """[N, W] with the numbers of a row next to each other: a view where the strides allow it, as those of a bank do."""
    rows = full.reshape(math.prod(full.shape[:head]), math.prod(full.shape[head:]))
    return rows if rows.stride(1) == 1 else rows.contiguous()
