"""Triton's row kernels: interpreted against float64, compiled for three generations of GPUs, and run where there is one."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedmoe_ds.foundation.gating import SWIGLU, GatedUnit
from fedmoe_ds.kernels.device_kernels import PINNED

triton = pytest.importorskip("triton")
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
UNITS = {"swiglu": SWIGLU, "geglu": GatedUnit(slope=1.6, cubic=0.07), "clamped": GatedUnit(slope=1.7, shift=1.0, limit=0.8)}


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def close(found: Tensor, expected: Tensor, what: object) -> None:
    """One rounding of what float64 says; in float32 some more for the sums."""
    epsilon = 2.0**-8 if found.dtype == torch.bfloat16 else 2e-6
    bound = 1.02 * epsilon * expected.abs() + 4e-6 * expected.abs().max().clamp(min=1.0)
    assert found.shape == expected.shape and bool(((found.cpu().double() - expected).abs() <= bound).all()), what


def check_norm(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    """Both kernels against float64, and a row alone against the same row among others."""
    from fedmoe_ds.kernels import rows_triton

    x, dy, w = (draw(seed, *shape, dtype=dtype, device=device) for seed, shape in enumerate([(rows, width)] * 2 + [(width,)]))
    y, inverse = rows_triton.norm(x, w, 1e-5)
    dx = rows_triton.norm_backward(dy, x, w, inverse)
    leaf = x.cpu().double().requires_grad_()
    plain = w.cpu().double() * leaf * (leaf.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    plain.backward(dy.cpu().double())
    assert leaf.grad is not None
    close(y, plain.detach(), (rows, width, dtype))
    close(dx, leaf.grad, (rows, width, dtype))
    alone, scale = rows_triton.norm(x[-1:].clone(), w, 1e-5)
    assert torch.equal(alone, y[-1:]) and torch.equal(scale, inverse[-1:])
    assert torch.equal(rows_triton.norm_backward(dy[-1:].clone(), x[-1:].clone(), w, scale), dx[-1:])


def check_rotation(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    """Heads as attention holds them, and angles that differ from half to half and are the same for all sequences."""
    from fedmoe_ds.kernels import rows_triton

    batch, length, heads, width = shape
    x_BSHK = draw(0, batch, heads, length, width, dtype=dtype, device=device).transpose(1, 2)
    dy_BSHK = draw(1, *shape, dtype=dtype, device=device)
    cosine, sine = (draw(seed, 1, length, width, dtype=dtype, device=device).expand(batch, -1, -1) for seed in (2, 3))
    leaf = x_BSHK.cpu().double().requires_grad_()
    a, b = leaf.chunk(2, -1)
    plain = leaf * cosine.cpu().double().unsqueeze(2) + torch.cat([-b, a], -1) * sine.cpu().double().unsqueeze(2)
    plain.backward(dy_BSHK.cpu().double())
    assert leaf.grad is not None
    close(rows_triton.rotate(x_BSHK, cosine, sine), plain.detach(), (shape, dtype))
    close(rows_triton.rotate(dy_BSHK, cosine, sine, back=True), leaf.grad, (shape, dtype))


def check_gate(unit: GatedUnit, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    """p times the unit, both gradients, and a row alone."""
    from fedmoe_ds.kernels import rows_triton

    h, dpa = draw(0, rows, 2 * width, dtype=dtype, device=device), draw(1, rows, width, dtype=dtype, device=device)
    p = draw(2, rows, dtype=dtype, device=device)
    shape = () if unit.plain else (unit.shape,)
    pa = rows_triton.gated(h, p, *shape)
    dh, dp = rows_triton.gated_backward(h, p, dpa, *shape)
    wide, share = h.cpu().double().requires_grad_(), p.cpu().double().requires_grad_()
    gate, up = wide.chunk(2, -1)
    gate = gate.clamp(max=unit.limit)
    up = (up if math.isinf(unit.limit) else up.clamp(-unit.limit, unit.limit)) + unit.shift
    plain = share.unsqueeze(-1) * gate * torch.sigmoid(gate * (unit.slope + unit.cubic * gate.square())) * up
    plain.backward(dpa.cpu().double())
    assert wide.grad is not None and share.grad is not None
    for found, expected in ((pa, plain.detach()), (dh, wide.grad), (dp, share.grad)):
        close(found, expected, (unit, rows, width, dtype))
    part = rows_triton.gated_backward(h[-1:].clone(), p[-1:].clone(), dpa[-1:].clone(), *shape)
    assert torch.equal(part[0], dh[-1:]) and torch.equal(part[1], dp[-1:])


def test_interpreted_rows_equal_float64() -> None:
    """And the optimizer's kernels, PyTorch's operations: one process for both."""
    script = Path(__file__).parent / "interpreted_rows.py"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0 and "51 problems" in result.stdout, result.stderr


NUMBERS = ("eps", "slope", "cubic", "shift", "limit")


def compiled(kernel: Any, number: str, arch: int, fixed: dict[str, Any]) -> Any:
    """A kernel as a launch would have it compiled: all addresses aligned, whole numbers and strides with them."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = dict.fromkeys(("x", "y", "w", "dy", "dx", "h", "p", "pa", "dpa", "dh", "dp", "cosine", "sine"), f"*{number}")
    types |= {"inverse": "*fp32"} | dict.fromkeys(NUMBERS, "fp32")
    signature = {name: "constexpr" if name in fixed else types.get(name, "i32") for name in kernel.arg_names}
    loose = {*NUMBERS, "rows", "heads", "length", *fixed}
    aligned = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(kernel.arg_names) if name not in loose}
    source = ASTSource(kernel, signature, constexprs=fixed, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(PINNED))


CASES = {
    "norm_rows": {},
    "norm_rows_back": {},
    "rotate_heads": {"BACK": True, "ROWS": 16, "WIDE": 64},
    "gate_rows": {"PLAIN": False},
    "gate_rows_back": {"PLAIN": True},
}


@pytest.mark.parametrize("number", FLOATS)
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("name", CASES)
def test_row_kernels_compile_without_a_device(
    name: str, arch: int, number: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # a kernel found in the cache would not have been compiled
    from fedmoe_ds.kernels import rows_triton

    kernel = compiled(getattr(rows_triton, name), number, arch, {**rows_triton.tile(2048), **CASES[name]})
    code = kernel.asm["ptx"]
    # Whole vectors from memory: a kernel of this kind is as fast as it reads and writes.
    assert kernel.asm["cubin"] and "ld.global.v4.b32" in code, code[:2000]
    assert kernel.metadata.shared <= 4096


@CUDA
@pytest.mark.parametrize("number", FLOATS)
@pytest.mark.parametrize("width", [1, 7, 128, 2048, 7168])
def test_rows_on_the_device_equal_float64(width: int, number: str) -> None:
    device = torch.device("cuda")
    check_norm(70, width, FLOATS[number], device)
    check_rotation((2, 5, 16, 2 * width), FLOATS[number], device)
    for unit in UNITS.values():
        check_gate(unit, 70, width, FLOATS[number], device)
