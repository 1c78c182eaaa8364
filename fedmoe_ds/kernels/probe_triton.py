"""Triton's probe: one tiny kernel, compiled and launched before a run relies on Triton (`device_kernels.triton_fault`).

A launch needs more than the package: a C compiler for its launcher (`$CC` alone where that is set), Python's headers, a folder
to keep what was compiled in, an assembler and a driver that know the device. All of it is used here as the other kernels do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def write_one(out: tl.tensor) -> None:
    """out[0] = 1."""
    tl.store(out + tl.program_id(0), 1.0)


def launch(device: torch.device, options: dict[str, bool]) -> None:
    """Launch the kernel on this device and look at what it wrote. Raises whatever Triton raises, RuntimeError otherwise."""
    out = torch.zeros(1, device=device)
    # Triton launches on the current device, wherever a tensor lies.
    with torch.cuda.device(device):
        write_one[(1,)](out, **options)
    if out.item() != 1.0:
        raise RuntimeError("it ran and wrote nothing")
