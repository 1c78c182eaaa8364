"""Device kernels: what multiplies groups of rows on a CUDA device: torch's grouped kernel, Triton's, or a loop inside torch.

`torch.nn.functional.grouped_mm` is one launch for bfloat16 on devices of compute capability 9 and 10. For other types and
devices (A100, consumer cards) it copies the ends of the groups to the host, which waits, and launches a product per group.
There Triton's kernels multiply (`grouped_triton.py`), where Triton is installed.
"""

from __future__ import annotations

import functools
import importlib.util

import torch

TORCH, LOOP, TRITON = "torch.nn.functional.grouped_mm", "a loop of torch's products", "Triton"

_TYPES = (torch.float32, torch.bfloat16)
_ONE_LAUNCH = (9, 10)
"""Major compute capabilities (Hopper, data-centre Blackwell) that torch has its grouped kernel for."""


def has_triton(device: torch.device) -> bool:
    """Whether Triton's kernels run on this device."""
    # ROCm's devices are called cuda as well; nothing here was compiled for them.
    return device.type == "cuda" and torch.version.cuda is not None and triton_installed()


@functools.cache
def triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def torch_groups(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch multiplies groups of this type in one launch on this CUDA device, and waits for nothing."""
    return dtype == torch.bfloat16 and torch.cuda.get_device_capability(device)[0] in _ONE_LAUNCH


def triton_serves(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether Triton's kernels can multiply rows of this type here."""
    return dtype in _TYPES and has_triton(device)


def grouped_by(dtype: torch.dtype, device: torch.device) -> str:
    """What multiplies groups of rows of this type by frozen weights on a CUDA device, in words."""
    if torch_groups(dtype, device):
        return TORCH
    return TRITON if triton_serves(dtype, device) else LOOP
