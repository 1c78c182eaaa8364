"""Matrix products whose rows do not depend on the other rows of a call, by matrix.cpp.

Legend: N rows, G groups, I input width, O output width.

Rows are float32; weights are float32 or bfloat16. With bfloat16 weights a processor with AMX-BF16 or AVX512-BF16 rounds the
rows as well and adds up in float32. Products with float32 weights have the same bits in all processor classes with fused
multiply-adds, products with bfloat16 weights those of their class. Functions answer None where the kernel does not serve:
another device or type, or no compiler.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmoe_ds.kernels.compiling import POINTER, SIZE, library
from fedmoe_ds.kernels.processor_class import classes_here

_WEIGHTS = {torch.float32: "product_groups", torch.bfloat16: "half_product_groups"}


@dataclass(frozen=True)
class Kernel:
    """matrix.cpp as it was compiled for a processor class.

    Attributes:
        processor: name of the class.
        rounds: whether rows are rounded to bfloat16 where the weights are.
    """

    processor: str
    library: ctypes.CDLL

    @property
    def rounds(self) -> bool:
        return self.processor.endswith("BF16")


@functools.cache
def kernel_of(processor: str) -> Kernel | None:
    """The kernel of a class; None where this processor is not of it, the compiler does not know it, or the system refuses."""
    instructions = {one.name: one.instructions for one in classes_here()}
    found = library("matrix", instructions=instructions[processor]) if processor in instructions else None
    # Linux hands out the registers of AMX only to processes that ask.
    if found is None or not found.permitted():
        return None
    for name in _WEIGHTS.values():
        getattr(found, name).argtypes = [*[POINTER] * 4, *[SIZE] * 5]
    return Kernel(processor, found)


@functools.cache
def best() -> Kernel | None:
    """That of the best class that can be had here."""
    return next((found for one in classes_here() if (found := kernel_of(one.name)) is not None), None)


@dataclass
class _Process:
    """What this process multiplies by, where that is not the best kernel."""

    kernel: Kernel | None = None


_process = _Process()


def take(processor: str | None) -> None:
    """From here on all products of this process are those of a class that can be had here; None: of the best one again."""
    _process.kernel = None if processor is None else kernel_of(processor)


def kernel() -> Kernel | None:
    """The one that a run uses: of the class that this process was told to `take`, else of the best one."""
    return _process.kernel or best()


def available() -> bool:
    """Whether the kernels could be compiled here."""
    return kernel() is not None


def serves(weight: Tensor) -> bool:
    """Whether the kernel takes weights of this kind; rows are always float32."""
    return weight.device.type == "cpu" and weight.dtype in _WEIGHTS and available()


def product(x: Tensor, weight: Tensor, transposed: bool, by: Kernel | None = None) -> Tensor | None:
    """x W^T for a weight [O, I] where `transposed`, else x W for a weight [I, O]; x is [..., I]. Contiguous weights only.

    Args:
        by: another kernel than that of a run.
    """
    # No copy of a frozen weight in every call: torch's product takes strides as they are.
    if x.dtype != torch.float32 or not (serves(weight) and weight.is_contiguous()):
        return None
    rows = x.shape[:-1].numel()
    # A plain product is a grouped one of one group: the same loop, hence the same bits for a row either way.
    ends_G = torch.tensor([rows], dtype=torch.int32)
    y_NO = grouped_product(x.reshape(rows, x.shape[-1]), weight.unsqueeze(0), ends_G, transposed, by)
    return None if y_NO is None else y_NO.view(*x.shape[:-1], y_NO.shape[1])


def grouped_product(
    x_NI: Tensor, weight_GAB: Tensor, ends_G: Tensor, transposed: bool, by: Kernel | None = None
) -> Tensor | None:
    """`product` for every group of rows with its own weight; `ends_G` (int32) are the groups' end rows."""
    # Each group's weight must be dense; the groups may lie apart.
    dense = weight_GAB.shape[0] == 0 or weight_GAB[0].is_contiguous()
    if not (dense and x_NI.dtype == torch.float32 and ends_G.dtype == torch.int32 and serves(weight_GAB)):
        return None
    x_NI = x_NI.contiguous()
    wide_in, wide_out = x_NI.shape[1], weight_GAB.shape[1 if transposed else 2]
    assert weight_GAB.shape[2 if transposed else 1] == wide_in and ends_G.is_contiguous(), (x_NI.shape, weight_GAB.shape)
    # Not zeroed: the ends cover all rows, and the kernel writes every element of them.
    y_NO = x_NI.new_empty(x_NI.shape[0], wide_out)
    pointers = [tensor.data_ptr() for tensor in (x_NI, weight_GAB, y_NO, ends_G)]
    chosen = by or kernel()
    assert chosen is not None, "ask `serves` first"
    run = getattr(chosen.library, _WEIGHTS[weight_GAB.dtype])
    status = run(*pointers, ends_G.shape[0], weight_GAB.stride(0), wide_out, wide_in, transposed)
    assert status == 0, "no memory for a panel of weights"
    return y_NO
