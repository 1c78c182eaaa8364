"""Triton's grouped products: interpreted against float64, and compiled for three generations of GPUs.

Legend: N rows, G groups, I input width, O output width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_lora_products import CPU, draw, groups_of

from fedmoe_ds.kernels.device_kernels import PINNED

triton = pytest.importorskip("triton")
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROWS_G = [5, 0, 1, 150, 0, 0, 64, 65, 0]
"""Empty groups at the start of a run of them and at the end, one tile exactly, one row more, several tiles."""
SHARED_BYTES = 99 * 1024
"""Shared memory that one program may have on sm_86 and sm_89; sm_80 and sm_90 give more."""


def products(
    rows_G: list[int],
    wide_in: int,
    wide_out: int,
    number: torch.dtype,
    weights: torch.dtype,
    device: torch.device,
    first: int = 0,
) -> list[torch.Tensor]:
    """The three products on groups [first, first + len(rows_G)) of one fixed problem; weights are strided, as in a bank."""
    from fedmoe_ds.kernels import grouped_triton

    (x_NI, y_NO, weight_GOI), groups = operands(rows_G, wide_in, wide_out, first), groups_of(rows_G, device)
    x_NI, y_NO = x_NI.to(device, number), y_NO.to(device, number)
    weight_GOI = weight_GOI.to(device, weights)
    out_GOI = torch.ones(len(rows_G), 2, wide_out, wide_in, device=device)[:, 1]
    grouped_triton.add_outer_(out_GOI, y_NO, x_NI, groups)
    forward = grouped_triton.rows_by_weights(x_NI, weight_GOI.mT, groups)
    return [forward, grouped_triton.rows_by_weights(y_NO, weight_GOI, groups), out_GOI]


def operands(rows_G: list[int], wide_in: int, wide_out: int, first: int = 0) -> tuple[torch.Tensor, ...]:
    start = sum(ROWS_G[:first])
    rows = slice(start, start + sum(rows_G))
    weight_GOI = draw(len(ROWS_G), 2, wide_out, wide_in, seed=1)[:, 1][first : first + len(rows_G)]
    return draw(sum(ROWS_G), wide_in, seed=2)[rows], draw(sum(ROWS_G), wide_out, seed=3)[rows], weight_GOI


def check_grouped(wide_in: int, wide_out: int, number: torch.dtype, weights: torch.dtype, device: torch.device) -> None:
    """All three against float64; then three groups alone, which must get the same bits."""
    found = products(ROWS_G, wide_in, wide_out, number, weights, device)
    # What the kernels are given: rounding of the operands is not theirs.
    x_NI, y_NO, weight_GOI = (part.to(number).double() for part in operands(ROWS_G, wide_in, wide_out))
    parts = zip(x_NI.split(ROWS_G), y_NO.split(ROWS_G), weight_GOI, strict=True)
    each = [(x @ weight.T, y @ weight, 1 + y.T @ x) for x, y, weight in parts]
    ahead, back, outer = zip(*each, strict=True)
    # Float32 is exact to float32; a bfloat16 product is rounded once, at its end (the interpreter cuts off), but no outer one.
    # Weights in float32 are rounded, too.
    half = 2.0**-7 if number == weights else 2.0**-6
    limits = [2e-6] * 3 if number == torch.float32 else [half, half, 2e-6]
    for ours, theirs, limit in zip(found, (torch.cat(ahead), torch.cat(back), torch.stack(outer)), limits, strict=True):
        error = (ours.cpu().double() - theirs).abs().max() / theirs.abs().max()
        assert error < limit, (wide_in, wide_out, number, weights, tuple(ours.shape), float(error))
    own = products(ROWS_G[3:6], wide_in, wide_out, number, weights, device, first=3)
    start, stop = sum(ROWS_G[:3]), sum(ROWS_G[:6])
    for whole, part, span in zip(found, own, (slice(start, stop), slice(start, stop), slice(3, 6)), strict=True):
        assert torch.equal(whole[span], part)
    nothing = products([0, 0], wide_in, wide_out, number, weights, device)
    assert [part.shape[0] for part in nothing] == [0, 0, 2] and bool((nothing[2] == 1).all())


def compiled(kernel: Any, sides: dict[str, int], number: str, weights: str, arch: int, dense: str) -> Any:
    """A kernel as a launch would have it compiled: the dense stride of W is 1; widths, strides and addresses are aligned."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = dict.fromkeys(("x", "y"), f"*{number}") | {"w": f"*{weights}", "out": "*fp32", "ends": "*i32"}
    fixed = {**sides, **({"GROUPS": 64, dense: 1} if "w" in kernel.arg_names else {})}
    signature = {name: "constexpr" if name in fixed else types.get(name, "i32") for name in kernel.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]] for place, name in enumerate(kernel.arg_names) if name not in ("groups", *fixed)
    }
    source = ASTSource(kernel, signature, constexprs=fixed, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(PINNED))


@pytest.mark.parametrize(
    ("arch", "dense", "number", "weights"),
    [
        (80, "w_in", "fp32", "fp32"),
        (80, "w_out", "bf16", "bf16"),
        (80, "w_in", "bf16", "fp32"),
        (90, "w_out", "fp32", "fp32"),
        (90, "w_in", "bf16", "bf16"),
        (100, "w_in", "fp32", "fp32"),
        (100, "w_out", "bf16", "bf16"),
    ],
)
def test_kernels_compile_without_a_device(
    arch: int, dense: str, number: str, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # a kernel found in the cache would not have been compiled
    from fedmoe_ds.kernels import grouped_triton

    types = FLOATS[number], FLOATS[weights]
    kernels = [(grouped_triton.product_of_rows, grouped_triton.tiles(*types))]
    if number == weights:
        kernels.append((grouped_triton.product_over_rows, grouped_triton.outer_tiles(types[0])))
    for function, sides in kernels:
        kernel = compiled(function, sides, number, weights, arch, dense)
        assert kernel.asm["cubin"] and kernel.metadata.shared <= SHARED_BYTES
        code = kernel.asm["ptx"]
        assert "tf32" not in code and ("mma" in code) == (number == "bf16") and "atom" not in code


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("number", "weights"), [("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32")])
@pytest.mark.parametrize("widths", [(7, 100), (512, 1024)])
def test_products_on_the_device_equal_float64(widths: tuple[int, int], number: str, weights: str) -> None:
    check_grouped(*widths, FLOATS[number], FLOATS[weights], torch.device("cuda"))


def test_the_cpu_keeps_its_own_products() -> None:
    from fedmoe_ds.kernels.device_kernels import triton_serves

    assert not triton_serves(torch.float32, CPU)
