"""Launches of Triton's kernels: their options and grids, recorded without a device; tensors have shapes and no numbers.

Legend: N rows, W a width, R adapter rank.
"""

from __future__ import annotations

import contextlib
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from every import every
from torch import Tensor

from fedmoe_ds import kernels
from fedmoe_ds.kernels.client_block import FACTORS, ClientBlock
from fedmoe_ds.kernels.groups import Groups

triton = pytest.importorskip("triton")
HALF, META = torch.bfloat16, torch.device("meta")
SIDE = 65_535
"""The second and the third side of a grid have no more programs on CUDA; the first has 2^31 - 1."""


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...], dict[str, Any]]]:
    """Name, grid and options of everything launched."""
    from triton.runtime.jit import JITFunction

    found = list[tuple[str, tuple[int, ...], dict[str, Any]]]()

    def record(self: Any, *args: object, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
        found.append((self.__name__, grid, options))

    monkeypatch.setattr(JITFunction, "run", record)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return found


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def block(moments: int, *item: int) -> ClientBlock:
    """Two layers, eight experts, three clients."""
    value, grad, *state = (empty(2, 8, 3, *item) for _ in range(2 + moments))
    return ClientBlock(value, grad, state, len(item), empty(len(FACTORS), 3), None, 0, 0.0)


def groups(count: int, rows: int) -> Groups:
    return Groups(torch.empty(count, dtype=torch.int32, device=META), rows)


def launch_all(rows: int, count: int) -> None:
    """Every function that launches, on rows of the width of a large model."""
    from fedmoe_ds.kernels import device_kernels, grouped_triton, lora_triton, optimizer_triton, rows_triton

    optimizer_triton.adamw(block(2, 28672, 4096), 1e-8)
    optimizer_triton.sgd(block(1, 28672, 4096), 0.9)
    x_NW, h_N2W, w_W, p_N = empty(rows, 4096), empty(rows, 8192), empty(4096), empty(rows)
    rows_triton.norm_backward(x_NW, x_NW, w_W, rows_triton.norm(x_NW, w_W, 1e-5)[1])
    rows_triton.rotate(empty(rows, 1, 32, 128), empty(rows, 1, 128), empty(rows, 1, 128))
    rows_triton.gated_backward(h_N2W, p_N, rows_triton.gated(h_N2W, p_N))
    of, products = groups(count, rows), lora_triton.TritonProducts()
    m_NR = products.project(x_NW, empty(count, 8, 4096), of, 0.5)
    products.expand_(x_NW, m_NR, empty(count, 4096, 8), of)
    products.grad_a_(empty(count, 8, 4096), m_NR, x_NW, of)
    grouped_triton.add_outer_(empty(count, 4096, 4096), x_NW, x_NW, of)
    grouped_triton.rows_by_weights(x_NW, empty(count, 4096, 8192, dtype=HALF), of)
    with contextlib.suppress(RuntimeError):  # nothing has written what it looks at
        device_kernels._launch(torch.device("cpu"))


def test_every_launch_pins_what_changes_bits(launches: list[tuple[str, tuple[int, ...], dict[str, Any]]]) -> None:
    """Triton 3.10 no longer fuses by default; all kernels of the package are here, and what they share is no kernel."""
    launch_all(100, 7)
    sources = Path(kernels.__file__).parent.glob("*_triton.py")
    modules = [importlib.import_module(f"{kernels.__name__}.{path.stem}") for path in sources]
    names = {
        name
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, triton.runtime.jit.JITFunction) and "program_id" in value.src
    }
    assert {name for name, _, _ in launches} == names and len(names) >= 13
    assert every(options.get("enable_fp_fusion") is True for _, _, options in launches), launches


@pytest.mark.parametrize(("rows", "count"), [(100, 7), (3_000_000, 1), (100, 70_000)])
def test_every_grid_can_be_launched(rows: int, count: int, launches: list[tuple[str, tuple[int, ...], dict[str, Any]]]) -> None:
    """Items of 117 million numbers, a group of millions of rows, and more groups than a second side takes."""
    launch_all(rows, count)
    assert every(grid[0] < 2**31 and max(grid[1:], default=1) <= SIDE for _, grid, _ in launches), launches
    steps = {name: grid for name, grid, _ in launches if name.endswith("_items")}
    assert steps == dict.fromkeys(("adamw_items", "sgd_items"), (2 * 8 * 3 * 28672 * 4096 // 1024,))
