"""Triton's low-rank products: interpreted against float64, compiled for three generations of GPUs, run where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from federations import alone, build, finish, make_config, run_alone, write_inputs
from test_lora_products import CPU, ROWS_G, everything, plain

from fedmoe_ds.errors import UserError
from fedmoe_ds.kernels import device_kernels, lora_products
from fedmoe_ds.kernels.device_kernels import PINNED

triton = pytest.importorskip("triton")
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHARED_BYTES = 99 * 1024
"""Shared memory that one program may have on sm_86 and sm_89; sm_80 and sm_90 give more."""


def check_products(width: int, rank: int, dtype: torch.dtype, device: torch.device) -> None:
    """All six products against float64; then two groups alone, which must get the same bits."""
    from fedmoe_ds.kernels.lora_triton import TritonProducts

    products, kind = TritonProducts(), {"dtype": dtype, "device": device}
    whole = everything(products, ROWS_G, width, rank, **kind)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    expectations = plain(width, rank)
    if rank == 3:  # once more with a scale for each group, and with factors that a bank has rounded
        whole += everything(products, ROWS_G, width, rank, **kind, scales=True, factors=dtype)
        expectations += plain(width, rank, scales=True)
    for found, expected in zip(whole, expectations, strict=True):
        error = (found.cpu().double() - expected).abs().max() / expected.abs().max()
        assert error < tolerance, (width, rank, dtype, tuple(found.shape), float(error))
    part = everything(products, ROWS_G[3:5], width, rank, first=3, **kind)
    start, stop = sum(ROWS_G[:3]), sum(ROWS_G[:5])
    spans = [slice(start, stop)] * 4 + [slice(3, 5)] * 2
    for full, own, span in zip(whole[:6], part, spans, strict=True):
        assert torch.equal(full[span], own)


def test_interpreted_products_equal_float64() -> None:
    script = Path(__file__).parent / "interpreted.py"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0 and "20 problems" in result.stdout and "5 problems" in result.stdout, result.stderr


def compiled(kernel: Any, number: str, arch: int, rank: int, dense: str) -> Any:
    """A kernel as a launch would have it compiled: the dense stride of V is 1; the others, widths and addresses are aligned."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fedmoe_ds.kernels.lora_triton import tiles

    # Factors in float32 on the oldest devices, on others in the rows' type; scales alike: one, or one per group.
    types = dict.fromkeys(("x", "y", "m"), f"*{number}") | {"v": "*fp32" if arch == 80 else f"*{number}", "dv": "*fp32"}
    types |= {"ends": "*i32", "scale": "fp32", "scales": "*fp32"}
    fixed: dict[str, Any] = tiles(rank) | {name: 1 for name in kernel.arg_names if name.endswith(f"v_{dense}")}
    if arch == 80 and "scales" in kernel.arg_names:
        fixed["scales"] = None
    signature = {name: "constexpr" if name in fixed else types.get(name, "i32") for name in kernel.arg_names}
    loose = {"scale", "rank", *fixed}
    aligned = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(kernel.arg_names) if name not in loose}
    source = ASTSource(kernel, signature, constexprs=fixed, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(PINNED))


@pytest.mark.parametrize("number", FLOATS)
@pytest.mark.parametrize(
    ("arch", "rank", "dense"), [(80, lora_products.MAX_TRITON_RANK, "wide"), (90, 8, "rank"), (100, 8, "wide")]
)
@pytest.mark.parametrize("name", ["rows_to_rank", "rank_to_rows", "sum_over_rows"])
def test_kernels_compile_without_a_device(
    name: str, arch: int, rank: int, dense: str, number: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # a kernel found in the cache would not have been compiled
    from fedmoe_ds.kernels import lora_triton as lowrank_triton

    kernel = compiled(getattr(lowrank_triton, name), number, arch, rank, dense)
    assert kernel.asm["cubin"] and kernel.metadata.shared <= SHARED_BYTES
    code = kernel.asm["ptx"]
    assert "tf32" not in code and ("mma" in code) == (number == "bf16")


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    lora_products.check_kernels("auto", 8, CPU)
    monkeypatch.setattr(lora_products, "triton_fault", lambda device: None)
    lora_products.check_kernels("triton", 8, device)
    with pytest.raises(UserError, match=r"execution.adapter_kernels: triton: needs a CUDA device, .* cpu; use auto"):
        lora_products.check_kernels("triton", 8, CPU)
    with pytest.raises(UserError, match=r"adapters.rank: 129: .* at most 128; use adapter_kernels=auto"):
        lora_products.check_kernels("triton", 129, device)


@CUDA
@pytest.mark.parametrize("number", FLOATS)
@pytest.mark.parametrize("rank", [1, 3, 8, 17, 64, 128])
@pytest.mark.parametrize("width", [7, 100, 512])
def test_products_on_the_device_equal_float64(width: int, rank: int, number: str) -> None:
    check_products(width, rank, FLOATS[number], torch.device("cuda"))


@CUDA
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_a_run_on_the_device_learns_what_the_cpu_learns(kernels: str, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    mode = {"reproducible": "fast"}
    expected = run_alone(make_config(tmp_path, "cpu", {"execution": mode}))
    runtime, topology = alone()
    config = make_config(tmp_path, "device", {"execution": mode | {"adapter_kernels": kernels}})
    found = finish(*build(config, replace(runtime, device=torch.device("cuda")), topology))
    for ours, theirs in zip(found.scores(), expected.scores(), strict=True):
        assert ours[:4] == theirs[:4] and ours[4] == pytest.approx(theirs[4], rel=1e-3)


def test_auto_takes_triton_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """All products of adapters on CUDA, and those of frozen weights where torch has none in one launch."""
    device, half = torch.device("cuda"), torch.bfloat16
    monkeypatch.setattr(device_kernels, "has_triton", lambda device: device.type == "cuda")
    for major, frozen in ((8, "Triton"), (9, device_kernels.TORCH), (10, device_kernels.TORCH), (12, "Triton")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, major=major: (major, 0))
        assert device_kernels.grouped_by(half, device) == frozen
        assert device_kernels.grouped_by(torch.float32, device) == "Triton"
        assert {lora_products.products_for(8, dtype, device).name for dtype in FLOATS.values()} == {"Triton"}
    assert lora_products.products_for(8, half, device, "torch").kernel == device_kernels.LOOP
    wide = lora_products.products_for(136, half, device)
    assert (wide.name, wide.kernel) == (device_kernels.TORCH, "Triton"), "wider than the tiles of products of low rank"
    assert lora_products.products_for(8, torch.float64, device).kernel == device_kernels.LOOP
    assert lora_products.products_for(8, torch.float32, CPU).name == "lowrank.cpp"
