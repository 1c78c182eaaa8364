"""Calibrate kernels: what one FLOP of a product and one attention score take, measured by themselves.

In whole passes these kinds of work grow together, so that no fit could tell them apart.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from fedmoe_ds.kernels.grouped_mm import grouped_mm, grouped_mm_t
from fedmoe_ds.kernels.groups import Groups
from fedmoe_ds.kernels.lora_products import products_for

CPU = torch.device("cpu")
ROWS, GROUPS = (24, 192), 24
"""Rows of a group, in small passes and in large ones."""
WIDTHS = (64, 128, 192)
WIDE = (512, 1024)
"""Widths of models whose weights are in bfloat16."""
RANKS = (8, 32)
REPEATS, WARM_UP = 28, 7


def known_units() -> dict[str, float]:
    """Seconds per FLOP of products with frozen weights (`flops`) and with adapters (`adapters`), and per score (`scores`)."""
    frozen = [_frozen(rows, width, torch.float32) for rows in ROWS for width in WIDTHS]
    adapters = [_adapters(rows, width, rank) for rows in ROWS for width in WIDTHS for rank in RANKS]
    return {"flops": statistics.mean(frozen), "adapters": statistics.mean(adapters), "scores": _score()}


def narrow_gain() -> float:
    """How many times as fast products are with frozen weights in bfloat16, by the medians of the same shapes in turns."""
    gains = []
    for rows in ROWS:
        for width in WIDE:
            wide = _frozen(rows, width, torch.float32)
            gains.append(wide / _frozen(rows, width, torch.bfloat16))
    return statistics.median(gains)


def _frozen(rows: int, width: int, dtype: torch.dtype) -> float:
    """Forward and backward of one grouped product."""
    x, w = torch.randn(GROUPS * rows, width), torch.randn(GROUPS, width, width, dtype=dtype)
    groups = _groups(rows)
    seconds = typical(lambda: (grouped_mm(x, w, groups), grouped_mm_t(x, w, groups)))
    return seconds / (2 * 2.0 * x.shape[0] * width * width)


def _adapters(rows: int, width: int, rank: int) -> float:
    """All six products of a pair of factors."""
    products = products_for(rank, torch.float32, CPU)
    x, m = torch.randn(GROUPS * rows, width), torch.randn(GROUPS * rows, rank)
    a, b, groups = torch.randn(GROUPS, rank, width), torch.randn(GROUPS, width, rank), _groups(rows)
    da, db = torch.zeros_like(a), torch.zeros_like(b)

    def everything() -> None:
        products.project(x, a, groups, 1.0)
        products.expand_(x, m, b, groups)
        products.back_project(x, b, groups, 1.0)
        products.back_expand_(x, m, a, groups)
        products.grad_a_(da, m, x, groups)
        products.grad_b_(db, m, x, groups)
        x.clamp_(-1.0, 1.0)

    return typical(everything) / (6 * 2.0 * x.shape[0] * width * rank)


def _score(heads: int = 4, length: int = 192, width: int = 32) -> float:
    """Forward and backward of causal attention on two sequences."""
    q, k, v = (torch.randn(2, heads, length, width, requires_grad=True) for _ in range(3))

    def both() -> None:
        F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()  # type: ignore[no-untyped-call]

    return typical(both) / (2 * heads * length * length)


def _groups(rows: int) -> Groups:
    return Groups(torch.arange(1, GROUPS + 1, dtype=torch.int32) * rows, GROUPS * rows)


def typical(action: Callable[[], object]) -> float:
    """Median seconds of a call, after a few to warm up."""
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        action()
        times.append(time.perf_counter() - began)
    return statistics.median(times[WARM_UP:])
