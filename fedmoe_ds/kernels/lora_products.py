"""LoRA products: low-rank products of row groups, what LoRA adds to the expert products, forward and backward.

Legend: N rows, G groups, I input width, O output width, R adapter rank.

With A [G, R, I], B [G, O, R] and scales s_g, rows of group g see  y += (s_g x A_g^T) B_g^T. Implementations of one interface:
`NativeProducts` (float32 on CPU, lowrank.cpp), `GroupedProducts` (torch's grouped kernel; any device and dtype), and
`TritonProducts` (CUDA, lora_triton.py): six launches for a pair of factors, added in place, of any width. torch's have 20
in bfloat16 on devices with its grouped kernel, and elsewhere one per group. No device has run Triton's yet.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Literal, Protocol

import torch
from torch import Tensor

from fedmoe_ds.errors import UserError
from fedmoe_ds.kernels.compiling import FLOAT, POINTER, SIZE, library
from fedmoe_ds.kernels.device_kernels import LOOP, TORCH, aligned, grouped_by, torch_groups, triton_fault, triton_serves
from fedmoe_ds.kernels.grouped_mm import add_outer_, grouped_mm, grouped_mm_t
from fedmoe_ds.kernels.groups import Groups, Scale

RANKS = (4, 8, 16, 32)
"""Adapter ranks that lowrank.cpp serves."""

MAX_TRITON_RANK = 128
"""Tiles of wider factors outgrow the shared memory of smaller GPUs, 99 KiB."""

Kernels = Literal["auto", "torch", "triton"]


class LowRankProducts(Protocol):
    """Gradients and results named with a trailing underscore are added in place.

    Attributes:
        name: the choice, as a run's identity holds it: the same on all generations of devices.
        kernel: what multiplies on this device, in words.
    """

    name: str
    kernel: str

    def project(self, x_NI: Tensor, a_GRI: Tensor, groups: Groups, scale: Scale) -> Tensor: ...

    def expand_(self, y_NO: Tensor, m_NR: Tensor, b_GOR: Tensor, groups: Groups) -> None: ...

    def back_project(self, dy_NO: Tensor, b_GOR: Tensor, groups: Groups, scale: Scale) -> Tensor: ...

    def back_expand_(self, dx_NI: Tensor, dm_NR: Tensor, a_GRI: Tensor, groups: Groups) -> None: ...

    def grad_a_(self, da_GRI: Tensor, dm_NR: Tensor, x_NI: Tensor, groups: Groups) -> None: ...

    def grad_b_(self, db_GOR: Tensor, m_NR: Tensor, dy_NO: Tensor, groups: Groups) -> None: ...


def products_for(rank: int, dtype: torch.dtype, device: torch.device, kernels: Kernels = "auto") -> LowRankProducts:
    """The implementation asked for; `auto`: the fastest that serves this rank, type and device, measured on a CPU, and on CUDA
    by its launches and traffic."""
    if kernels == "triton":
        check_kernels(kernels, rank, device)
    if kernels == "triton" or (kernels == "auto" and rank <= MAX_TRITON_RANK and triton_serves(dtype, device)):
        from fedmoe_ds.kernels.lora_triton import TritonProducts  # Triton is there only with CUDA builds of torch

        return TritonProducts()
    # `torch` asks for torch's kernels on a CPU too, to compare or to exclude our own.
    suits = kernels == "auto" and device.type == "cpu" and dtype == torch.float32 and rank in RANKS
    found = compiled() if suits else None
    return GroupedProducts(rank, dtype, device, ours=kernels == "auto") if found is None else NativeProducts(found)


def check_kernels(kernels: Kernels, rank: int, device: torch.device) -> None:
    """Whether the kernels asked for can run here. Raises UserError."""
    if kernels != "triton":
        return
    if device.type != "cuda":
        raise UserError(f"execution.adapter_kernels: triton: needs a CUDA device, and this run is on {device.type}; use auto")
    if rank > MAX_TRITON_RANK:
        raise UserError(f"adapters.rank: {rank}: Triton's kernels take at most {MAX_TRITON_RANK}; use adapter_kernels=auto")
    fault = triton_fault(device)
    if fault is not None:
        raise UserError(f"execution.adapter_kernels: triton: {fault}; or use auto")


@functools.cache
def compiled() -> ctypes.CDLL | None:
    """lowrank.cpp, or None without a compiler."""
    found = library("lowrank")
    for name in ("project", "expand", "back_project", "back_expand", "grad_a", "grad_b") if found is not None else ():
        # Without argtypes ctypes would pass integers as 32 bits and refuse floats.
        scaled = [FLOAT] if name in ("project", "back_project") else []
        getattr(found, name).argtypes = [*[POINTER] * 4, *[SIZE] * 4, *scaled]
    return found


class GroupedProducts:
    """Through grouped matrix products: torch's, and with `ours` also those that replace them (grouped_mm.py)."""

    def __init__(self, rank: int, dtype: torch.dtype, device: torch.device, ours: bool = True) -> None:
        self.ours = ours
        self.name = self.kernel = TORCH if aligned(rank, dtype) else f"a loop (rank {rank} is not 16-byte aligned)"
        if device.type == "cuda" and ours and triton_serves(dtype, device):
            self.kernel = grouped_by(dtype, device, [rank])
        elif device.type == "cuda" and not torch_groups(dtype, device):
            self.kernel = LOOP

    def project(self, x_NI: Tensor, a_GRI: Tensor, groups: Groups, scale: Scale) -> Tensor:
        return _scaled_(grouped_mm(x_NI, a_GRI, groups, self.ours), groups, scale)

    def expand_(self, y_NO: Tensor, m_NR: Tensor, b_GOR: Tensor, groups: Groups) -> None:
        # torch's grouped kernel cannot add to its target, so the delta exists for a moment.
        y_NO.add_(grouped_mm(m_NR, b_GOR, groups, self.ours))

    def back_project(self, dy_NO: Tensor, b_GOR: Tensor, groups: Groups, scale: Scale) -> Tensor:
        return _scaled_(grouped_mm_t(dy_NO, b_GOR, groups, self.ours), groups, scale)

    def back_expand_(self, dx_NI: Tensor, dm_NR: Tensor, a_GRI: Tensor, groups: Groups) -> None:
        dx_NI.add_(grouped_mm_t(dm_NR, a_GRI, groups, self.ours))

    def grad_a_(self, da_GRI: Tensor, dm_NR: Tensor, x_NI: Tensor, groups: Groups) -> None:
        add_outer_(da_GRI, dm_NR, x_NI, groups, self.ours)

    def grad_b_(self, db_GOR: Tensor, m_NR: Tensor, dy_NO: Tensor, groups: Groups) -> None:
        add_outer_(db_GOR, dy_NO, m_NR, groups, self.ours)


class NativeProducts:
    """Through the compiled loops of lowrank.cpp."""

    name = kernel = "lowrank.cpp"

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def project(self, x_NI: Tensor, a_GRI: Tensor, groups: Groups, scale: Scale) -> Tensor:
        m_NR = x_NI.new_empty(x_NI.shape[0], a_GRI.shape[1])
        self._run("project", (x_NI, a_GRI, m_NR), a_GRI, groups, x_NI.shape[1], a_GRI.shape[1], _same(scale))
        return m_NR if isinstance(scale, float) else _scaled_(m_NR, groups, scale)

    def expand_(self, y_NO: Tensor, m_NR: Tensor, b_GOR: Tensor, groups: Groups) -> None:
        self._run("expand", (y_NO, m_NR, b_GOR), b_GOR, groups, y_NO.shape[1], m_NR.shape[1])

    def back_project(self, dy_NO: Tensor, b_GOR: Tensor, groups: Groups, scale: Scale) -> Tensor:
        dm_NR = dy_NO.new_empty(dy_NO.shape[0], b_GOR.shape[2])
        self._run("back_project", (dy_NO, b_GOR, dm_NR), b_GOR, groups, dy_NO.shape[1], b_GOR.shape[2], _same(scale))
        return dm_NR if isinstance(scale, float) else _scaled_(dm_NR, groups, scale)

    def back_expand_(self, dx_NI: Tensor, dm_NR: Tensor, a_GRI: Tensor, groups: Groups) -> None:
        self._run("back_expand", (dx_NI, dm_NR, a_GRI), a_GRI, groups, dx_NI.shape[1], dm_NR.shape[1])

    def grad_a_(self, da_GRI: Tensor, dm_NR: Tensor, x_NI: Tensor, groups: Groups) -> None:
        self._run("grad_a", (da_GRI, dm_NR, x_NI), da_GRI, groups, x_NI.shape[1], dm_NR.shape[1])

    def grad_b_(self, db_GOR: Tensor, m_NR: Tensor, dy_NO: Tensor, groups: Groups) -> None:
        self._run("grad_b", (db_GOR, m_NR, dy_NO), db_GOR, groups, dy_NO.shape[1], m_NR.shape[1])

    def _run(
        self, name: str, tensors: tuple[Tensor, ...], grouped: Tensor, groups: Groups, width: int, rank: int, *scale: float
    ) -> None:
        for tensor in tensors:
            # Rows are dense. Group weights may lie apart: a client's slice of the bank strides over the other clients' items.
            assert tensor.dtype == torch.float32 and (tensor is grouped or tensor.is_contiguous()), (name, tensor.shape)
        assert grouped.shape[0] == 0 or grouped[0].is_contiguous(), (name, grouped.stride())
        pointers = [tensor.data_ptr() for tensor in tensors]
        function = getattr(self.library, name)
        status = function(*pointers, groups.ends_G.data_ptr(), len(groups), grouped.stride(0), width, rank, *scale)
        # 1 is a rank without a compiled loop; `products_for` has asked RANKS before.
        assert status == 0, (name, rank)


def _same(scale: Scale) -> float:
    """What the compiled loops are given: they take one scale for all rows."""
    return scale if isinstance(scale, float) else 1.0


def _scaled_(m_NR: Tensor, groups: Groups, scale: Scale) -> Tensor:
    """The middle, which is only R wide, times the scale of each row's group."""
    return m_NR.mul_(scale if isinstance(scale, float) else groups.spread(scale).unsqueeze(1))
