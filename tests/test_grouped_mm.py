"""Grouped products in chunks of groups: torch's kernel takes fewer than 1024 of them on CUDA.

Legend: N rows, G groups, I input width, O output width.
"""

from __future__ import annotations

import pytest
import torch

from fedmoe_ds.kernels import grouped_mm as grouped
from fedmoe_ds.kernels.grouped_mm import (
    add_outer_,
    grouped_mm,
    grouped_mm_t,
    grouped_outer,
    products_of_rows,
    products_over_rows,
)
from fedmoe_ds.kernels.groups import Groups

ROWS_G = [3, 0, 2, 0, 0, 0, 4, 1, 0]
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("rows_G", [ROWS_G, [0] * 9], ids=["some empty", "no rows"])
@pytest.mark.parametrize("most", [1, 2, 3, 8, 9])
def test_chunks_change_nothing(rows_G: list[int], most: int) -> None:
    draw, rows = torch.Generator().manual_seed(most), sum(rows_G)
    x_NI, weight_GIO = torch.randn(rows, 8, generator=draw), torch.randn(len(rows_G), 8, 12, generator=draw)
    y_NO = torch.randn(rows, 12, generator=draw)
    groups = Groups(torch.tensor(rows_G).cumsum(0).to(torch.int32), rows)
    whole = torch.nn.functional.grouped_mm(x_NI, weight_GIO, offs=groups.ends_G)
    assert torch.equal(products_of_rows(x_NI, weight_GIO, groups, most), whole)
    summed = torch.nn.functional.grouped_mm(y_NO.t(), x_NI, offs=groups.ends_G)
    assert torch.equal(products_over_rows(y_NO, x_NI, groups, most), summed)


def test_what_follows_from_the_ends() -> None:
    groups = Groups(torch.tensor(ROWS_G).cumsum(0).to(torch.int32), sum(ROWS_G))
    assert groups.rows_G.tolist() == ROWS_G and groups.empty_G.tolist() == [not rows for rows in ROWS_G]
    assert groups.spread(torch.arange(9.0)).tolist() == [g for g, rows in enumerate(ROWS_G) for _ in range(rows)]
    assert groups.bounds(4) == [5, 10, 10] and groups.bounds(4) is groups.bounds(4), "one transfer per plan"
    assert groups.empty_G is groups.empty_G and groups.group_N is groups.group_N


def test_rows_of_nobody_reach_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle rank multiplies nothing; kernels on a device are not promised to."""
    monkeypatch.setattr(grouped.F, "grouped_mm", None)
    groups = Groups(torch.zeros(3, dtype=torch.int32), 0)
    x_NI, y_NO, weight_GOI = (torch.zeros(*shape, dtype=torch.bfloat16) for shape in ((0, 8), (0, 16), (3, 16, 8)))
    assert grouped_mm(x_NI, weight_GOI, groups).shape == (0, 16) and grouped_mm_t(y_NO, weight_GOI, groups).shape == (0, 8)
    out_GOI = torch.ones(3, 16, 8)
    add_outer_(out_GOI, y_NO, x_NI, groups)
    assert bool((out_GOI == 1).all()) and not grouped_outer(y_NO, x_NI, groups).any()


@CUDA
@pytest.mark.parametrize("number", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [5, grouped.CUDA_GROUPS, grouped.CUDA_GROUPS + 1, 2500])
def test_products_on_the_device_equal_float64(groups: int, number: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(groups)
    rows_G = torch.randint(0, 5, (groups,), generator=draw)
    rows = int(rows_G.sum())
    ends = Groups(rows_G.cumsum(0).to("cuda", torch.int32), rows)
    x_NI, y_NO, weight_GOI = (
        torch.randn(*shape, generator=draw).to(number) for shape in ((rows, 16), (rows, 24), (groups, 24, 16))
    )
    each_NOI = weight_GOI.double().repeat_interleave(rows_G, 0)
    places = torch.arange(groups).repeat_interleave(rows_G)
    outer_NOI = y_NO.double()[:, :, None] * x_NI.double()[:, None, :]
    expected = [
        (each_NOI @ x_NI.double()[:, :, None])[:, :, 0],
        (y_NO.double()[:, None, :] @ each_NOI)[:, 0],
        torch.zeros(groups, 24, 16, dtype=torch.float64).index_add_(0, places, outer_NOI),
    ]
    x, y, weight = x_NI.cuda(), y_NO.cuda(), weight_GOI.cuda()
    found = [grouped_mm(x, weight, ends), grouped_mm_t(y, weight, ends), grouped_outer(y, x, ends)]
    tolerance = 2e-5 if number == torch.float32 else 2e-2
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.cpu().double() - theirs).abs().max() < tolerance * theirs.abs().max()
