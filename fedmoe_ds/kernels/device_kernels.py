"""Device kernels: what multiplies groups of rows on a CUDA device: torch's grouped kernel, Triton's, or a loop inside torch.

`torch.nn.functional.grouped_mm` is one launch for bfloat16 on devices of compute capability 9 and 10. For other types and
devices (A100, consumer cards) it copies the ends of the groups to the host, which waits, and launches a product per group.
There Triton's kernels multiply (`grouped_triton.py`), where they can run: a first launch tells.
"""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import textwrap
from collections.abc import Iterable

import torch

TORCH, LOOP, TRITON = "torch.nn.functional.grouped_mm", "a loop of torch's products", "Triton"

PINNED = {"enable_fp_fusion": True}
"""Options of every launch: a product and its sum are rounded once. Triton 3.10 has another default, and with it other bits."""

# torch.nn.functional.grouped_mm reads every matrix through 16-byte aligned strides.
_ALIGNMENT_BYTES = 16

# On CUDA it takes fewer than 1024 groups: one thread of a block prepares each.
CUDA_GROUPS = 1023

_TYPES = (torch.float32, torch.bfloat16)
_OLDEST = (8, 0)
_ONE_LAUNCH = (9, 10)
"""Major compute capabilities (Hopper, data-centre Blackwell) that torch has its grouped kernel for."""


def has_triton(device: torch.device) -> bool:
    """Whether Triton's kernels run on this device."""
    return triton_fault(device) is None


@functools.cache
def triton_fault(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on this device, in one line; None where they can: the first call launches one.

    Triton's launchers are compiled at run time. What that takes ($CC or a compiler, Python.h, a folder to write to, an
    assembler that knows the device) is asked of Triton itself, before a pass of a run relies on it.
    """
    if device.type != "cuda":
        return f"this is {device.type}, and not a CUDA device"
    # ROCm's devices are called cuda as well; nothing here was compiled for them.
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not built for CUDA"
    if not triton_installed():
        return "Triton is not installed; pip install triton"
    try:
        capability = torch.cuda.get_device_capability(device)
        if capability < _OLDEST:
            return "compute capability {}.{} is below {}.{}".format(*capability, *_OLDEST)
        _launch(device)
    # Whatever it is, a run can do without: torch multiplies, and the start line says why.
    except Exception as error:
        return f"a first kernel failed: {_in_one_line(error)}"
    return None


def _launch(device: torch.device) -> None:
    from fedmoe_ds.kernels import probe_triton  # Triton is there only with CUDA builds of torch

    probe_triton.launch(device, PINNED)


def _in_one_line(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        # Its own text is the whole command.
        program = error.cmd if isinstance(error.cmd, str) else error.cmd[0]
        return f"{program} ended with status {error.returncode} (a C compiler and Python.h are needed; CC names the compiler)"
    return textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...")


@functools.cache
def triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def aligned(width: int, dtype: torch.dtype) -> bool:
    """Whether rows of this width can go through torch's grouped kernel."""
    return width * dtype.itemsize % _ALIGNMENT_BYTES == 0


def torch_groups(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch multiplies groups of this type in one launch on this CUDA device, and waits for nothing."""
    return dtype == torch.bfloat16 and torch.cuda.get_device_capability(device)[0] in _ONE_LAUNCH


def triton_serves(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether Triton's kernels can multiply rows of this type here."""
    return dtype in _TYPES and has_triton(device)


def grouped_by(dtype: torch.dtype, device: torch.device, widths: Iterable[int] = (), groups: int = 1) -> str:
    """What multiplies groups of rows of this type on a CUDA device, in words: the choice of `grouped_mm`.

    Args:
        widths: of the rows on both sides of the product.
        groups: how many there are.
    """
    ours = triton_serves(dtype, device)
    # torch's one launch takes neither every width nor every number of groups; more groups are more launches.
    suits = torch_groups(dtype, device) and all(aligned(width, dtype) for width in widths)
    if suits and (groups <= CUDA_GROUPS or not ours):
        return TORCH
    return TRITON if ours else LOOP
