"""Low-rank products: compiled loops and torch's grouped products against float64; bits depend on one's own group alone.

Legend: N rows, G groups, I input width, O output width, R rank.
"""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor

from fedmoe_ds.kernels import lora_products as lowrank
from fedmoe_ds.kernels.groups import Groups
from fedmoe_ds.kernels.lora_products import GroupedProducts, LowRankProducts, NativeProducts, products_for

CPU = torch.device("cpu")
ROWS_G = [5, 0, 1, 23, 8, 0, 64, 0]
SCALES_G = torch.linspace(0.5, 1.5, len(ROWS_G))


def compiled() -> NativeProducts:
    library = lowrank.compiled()
    assert library is not None, f"g++ is {shutil.which('g++')}, but lowrank.cpp could not be built"
    return NativeProducts(library)


def groups_of(rows_G: list[int], device: torch.device = CPU) -> Groups:
    return Groups(torch.tensor(rows_G).cumsum(0).to(device, torch.int32), sum(rows_G))


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def everything(
    products: LowRankProducts,
    rows_G: list[int],
    width: int,
    rank: int,
    first: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    scales: bool = False,
    factors: torch.dtype = torch.float32,
) -> list[Tensor]:
    """All six products on groups [first, first + len(rows_G)) of one fixed problem; weights are strided views, as in a bank.
    Rows and factors have the types given, factors' gradients are float32. The scale is 0.5; with `scales` each group's own."""
    count, groups = len(ROWS_G), groups_of(rows_G, device)
    start = sum(ROWS_G[:first])
    rows = slice(start, start + sum(rows_G))
    held = slice(first, first + len(rows_G))
    a_GRI = draw(count, 2, rank, width, seed=1).to(device, factors)[:, 1][held]
    b_GOR = draw(count, 2, width, rank, seed=2).to(device, factors)[:, 1][held]
    scale = SCALES_G.to(device)[held] if scales else 0.5
    x_NI, dy_NO = (draw(sum(ROWS_G), width, seed=seed)[rows].to(device, dtype, copy=True) for seed in (3, 4))
    y_NO, dx_NI = torch.ones_like(dy_NO), torch.ones_like(x_NI)
    da_GRI, db_GOR = (torch.ones(count, 2, *shape, device=device)[:, 1][held] for shape in ((rank, width), (width, rank)))
    m_NR = products.project(x_NI, a_GRI, groups, scale)
    products.expand_(y_NO, m_NR, b_GOR, groups)
    dm_NR = products.back_project(dy_NO, b_GOR, groups, scale)
    products.back_expand_(dx_NI, dm_NR, a_GRI, groups)
    products.grad_a_(da_GRI, dm_NR, x_NI, groups)
    products.grad_b_(db_GOR, m_NR, dy_NO, groups)
    return [m_NR, y_NO, dm_NR, dx_NI, da_GRI, db_GOR]


def plain(width: int, rank: int, scales: bool = False) -> list[Tensor]:
    count = len(ROWS_G)
    a_GRI, b_GOR = draw(count, 2, rank, width, seed=1)[:, 1].double(), draw(count, 2, width, rank, seed=2)[:, 1].double()
    x_NI, dy_NO = draw(sum(ROWS_G), width, seed=3).double(), draw(sum(ROWS_G), width, seed=4).double()
    parts = []
    for g, (x, dy) in enumerate(zip(x_NI.split(ROWS_G), dy_NO.split(ROWS_G), strict=True)):
        scale = float(SCALES_G[g]) if scales else 0.5
        m, dm = scale * x @ a_GRI[g].T, scale * dy @ b_GOR[g]
        parts.append([m, 1 + m @ b_GOR[g].T, dm, 1 + dm @ a_GRI[g], 1 + dm.T @ x, 1 + dy.T @ m])
    columns = list(zip(*parts, strict=True))
    return [torch.cat(column) for column in columns[:4]] + [torch.stack(column) for column in columns[4:]]


@pytest.mark.parametrize("rank", lowrank.RANKS)
@pytest.mark.parametrize("width", [16, 48, 7, 100])
def test_compiled_products_equal_float64(width: int, rank: int) -> None:
    for found, expected in zip(everything(compiled(), ROWS_G, width, rank), plain(width, rank), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("rank", [3, 8])
def test_grouped_products_equal_float64(rank: int) -> None:
    products = GroupedProducts(rank, torch.float32, CPU)
    for found, expected in zip(everything(products, ROWS_G, 32, rank), plain(32, rank), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("torchs", [False, True])
def test_groups_may_have_scales_of_their_own(torchs: bool) -> None:
    products = GroupedProducts(8, torch.float32, CPU) if torchs else compiled()
    for found, expected in zip(everything(products, ROWS_G, 32, 8, scales=True), plain(32, 8, scales=True), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("width", [48, 100])
def test_a_group_does_not_see_the_others(width: int) -> None:
    whole = everything(compiled(), ROWS_G, width, 8)
    part = everything(compiled(), ROWS_G[3:5], width, 8, first=3)
    start, stop = sum(ROWS_G[:3]), sum(ROWS_G[:5])
    for full, own in zip(whole[:4], part[:4], strict=True):
        assert torch.equal(full[start:stop], own)
    for full, own in zip(whole[4:], part[4:], strict=True):
        assert torch.equal(full[3:5], own)


def test_choice_of_implementation() -> None:
    assert products_for(8, torch.float32, CPU).name == "lowrank.cpp"
    assert products_for(8, torch.bfloat16, CPU).name == "torch.nn.functional.grouped_mm"
    assert products_for(3, torch.float32, CPU).name.startswith("a loop")
    assert products_for(8, torch.float32, CPU, "torch").name == "torch.nn.functional.grouped_mm"
