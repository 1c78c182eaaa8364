"""Floor: the matrix products of a wave and nothing else, each one `torch.mm` into preallocated memory.

Counted, forward and backward: frozen matrices x W^T and dy W; adapters with their weight gradients as well; dense projections,
attention scores and values (whole squares), router, output head. Not counted: what a backward pass recomputes, and dx below the
first adapters. The wave's own routing gives the row counts. What runs these products through torch cannot be faster; what has
kernels of its own can.

Legend: T token rows, N routed rows, C clients, L layers, E experts, G groups, D model width, F expert width, R rank,
S positions, K head width, I input width, O output width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from fedmoe_ds.bench.harness.system import Clock, Timing
from fedmoe_ds.bench.harness.workload import Workload

Spans = list[tuple[int, int, int]]
"""(group, first row, end row); empty groups are left out."""
Product = tuple[Tensor, Tensor, Tensor]
"""Two factors and the memory for their product."""
_LARGEST_SIDE = 8192


class Floor:
    """Products of one mean step of a workload.

    Args:
        workload: the wave.
        rows_CLE: routed rows per client, layer and expert over the whole timed wave.
    """

    def __init__(self, workload: Workload, rows_CLE: np.ndarray) -> None:
        self.workload = workload
        self.tokens = len(workload.caps) * workload.sequences * workload.length
        if not workload.shape.experts:
            rows_CLE = np.zeros((len(workload.caps), workload.shape.layers, 0))
        rows_LEC = np.rint(rows_CLE.transpose(1, 2, 0) / workload.steps).astype(int)
        self.dtype = getattr(torch, workload.dtype)
        memory = Memory(int(max(rows_LEC.sum((1, 2)).max(), self.tokens)))
        block = self._experts if workload.shape.experts else self._feed_forward
        self.products: list[Product] = []
        self.batched: list[Product] = []
        for layer, rows_EC in enumerate(rows_LEC):
            self.products += [*self._attention(memory, first=layer == 0), *block(memory, rows_EC)]
            self.batched += self._scores(memory)
        targets = self.tokens // workload.length * (workload.length - 1)
        self.products += _frozen(memory, workload.shape.hidden, workload.shape.vocab, [(0, 0, targets)], dtype=self.dtype)

    def measure(self) -> Timing:
        """Measured time of all products of the timed wave: one step, times the number of steps."""
        clock = Clock()
        for left, right, out in self.products:
            torch.mm(left, right, out=out)
        for left, right, out in self.batched:
            torch.bmm(left, right, out=out)
        return clock.stop().times(self.workload.steps)

    def flops(self) -> float:
        """Of all products of the timed wave."""
        products = [*self.products, *self.batched]
        return self.workload.steps * sum(2.0 * left.numel() * right.shape[-1] for left, right, _ in products)

    def _experts(self, memory: Memory, rows_EC: np.ndarray) -> Iterator[Product]:
        shape, rank = self.workload.shape, self.workload.rank
        by_expert, by_group = _spans(rows_EC.sum(1)), _spans(rows_EC.reshape(-1))
        yield from _frozen(memory, shape.hidden, shape.experts, [(0, 0, self.tokens)], dtype=self.dtype)  # the router
        for wide_in, wide_out in ((shape.hidden, 2 * shape.ffn), (shape.ffn, shape.hidden)):
            yield from _frozen(memory, wide_in, wide_out, by_expert, dtype=self.dtype)
            yield from _trained(memory, wide_in, rank, by_group)
            yield from _trained(memory, wide_out, rank, by_group)

    def _feed_forward(self, memory: Memory, _: np.ndarray) -> Iterator[Product]:
        shape, rank = self.workload.shape, self.workload.rank
        for wide_in, wide_out in ((shape.hidden, shape.ffn), (shape.hidden, shape.ffn), (shape.ffn, shape.hidden)):
            yield from _frozen(memory, wide_in, wide_out, [(0, 0, self.tokens)], dtype=self.dtype)
            yield from _trained(memory, wide_in, rank, self._per_client)
            yield from _trained(memory, wide_out, rank, self._per_client)

    @property
    def _per_client(self) -> Spans:
        load = self.workload
        return _spans(np.full(len(load.caps), load.sequences * load.length))

    def _attention(self, memory: Memory, first: bool) -> Iterator[Product]:
        load, width = self.workload, self.workload.shape.hidden
        everything = [(0, 0, self.tokens)]
        per_client = self._per_client
        for _ in "qkv":
            yield from _frozen(memory, width, width, everything, need_dx=not first, dtype=self.dtype)
        yield from _frozen(memory, width, width, everything, dtype=self.dtype)
        for _ in load.attention:
            yield from _trained(memory, width, load.rank, per_client, need_wide=not first)
            yield from _trained(memory, width, load.rank, per_client)

    def _scores(self, memory: Memory) -> list[Product]:
        """Scores and their gradient; values, and the gradients of queries, keys and values."""
        load = self.workload
        heads = self.tokens // load.length * load.shape.heads
        x_HSK = memory.rows(load.shape.hidden)[: self.tokens].reshape(heads, load.length, -1)
        scores_HSS, out_HSK = torch.rand(heads, load.length, load.length), torch.empty_like(x_HSK)
        square = (x_HSK, x_HSK.transpose(1, 2), torch.empty_like(scores_HSS))
        return [*[square] * 2, *[(scores_HSS, x_HSK, out_HSK)] * 2, *[(scores_HSS.transpose(1, 2), x_HSK, out_HSK)] * 2]


class DeviceFloor:
    """The same on a GPU, where small products one by one would measure launches: their FLOPs at the rate of a large product.

    Args:
        workload, rows_CLE: as for `Floor`.
        side: of the large product's square factors; 8192, or four times the width of a smaller model, where nothing is given.
    """

    def __init__(self, workload: Workload, rows_CLE: np.ndarray, side: int | None = None) -> None:
        with torch.device("meta"):  # shapes alone
            self.flops = Floor(workload, rows_CLE).flops()
        self.device = workload.device
        self.side = side = side or min(_LARGEST_SIDE, 4 * workload.shape.hidden)
        self.left, self.right, self.out = (
            torch.rand(side, side, dtype=getattr(torch, workload.dtype), device=workload.device) for _ in range(3)
        )

    def measure(self, repeats: int = 10) -> Timing:
        """Seconds that the wave's products would take; there is no CPU time in them."""
        clock = Clock(self.device)
        for _ in range(repeats):
            torch.mm(self.left, self.right, out=self.out)
        rate = repeats * 2.0 * self.side**3 / clock.stop().wall
        return Timing(self.flops / rate, 0.0)


class Memory:
    """Random inputs, weights and room for results, one of a kind per width; reuse only makes the floor lower."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._kept: dict[tuple[str | int | torch.dtype, ...], Tensor] = {}

    def rows(self, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._keep("rows", torch.rand, dtype, 0, self._rows, width)

    def room(self, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._keep("room", torch.empty, dtype, 0, self._rows, width)

    def weights(self, groups: int, width_out: int, width_in: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._keep("weights", torch.rand, dtype, groups, width_out, width_in)

    def gradients(self, groups: int, width_out: int, width_in: int) -> Tensor:
        return self._keep("gradients", torch.empty, torch.float32, groups, width_out, width_in)

    def _keep(self, kind: str, make: Callable[..., Tensor], dtype: torch.dtype, groups: int, *matrix: int) -> Tensor:
        key: tuple[str | int | torch.dtype, ...] = (kind, dtype, groups, *matrix)
        if key not in self._kept:
            self._kept[key] = make(*([groups] if groups else []), *matrix, dtype=dtype)
        return self._kept[key]


def _frozen(
    memory: Memory, wide_in: int, wide_out: int, spans: Spans, need_dx: bool = True, dtype: torch.dtype = torch.float32
) -> Iterator[Product]:
    """x W^T and dy W for every group, in the type of the frozen weights."""
    weight_GOI = memory.weights(spans[-1][0] + 1, wide_out, wide_in, dtype)
    x_NI, y_NO = memory.rows(wide_in, dtype), memory.rows(wide_out, dtype)
    dx_NI, out_NO = memory.room(wide_in, dtype), memory.room(wide_out, dtype)
    for group, start, stop in spans:
        yield x_NI[start:stop], weight_GOI[group].t(), out_NO[start:stop]
    for group, start, stop in spans if need_dx else []:
        yield y_NO[start:stop], weight_GOI[group], dx_NI[start:stop]


def _trained(memory: Memory, wide: int, rank: int, spans: Spans, need_wide: bool = True) -> Iterator[Product]:
    """One side of a LoRA pair for every group: wide to rank, rank to wide, weight gradient.

    For A they are x A^T, dm A and dm^T x; for B they are dy B, m B^T and m^T dy: the same shapes. The weights are stored
    [R, wide] on both sides, which is the fastest layout.
    """
    weight_GRI = memory.weights(spans[-1][0] + 1, rank, wide)
    grad_GRI = memory.gradients(spans[-1][0] + 1, rank, wide)
    x_NI, m_NR, dx_NI, out_NR = memory.rows(wide), memory.rows(rank), memory.room(wide), memory.room(rank)
    for group, start, stop in spans:
        yield x_NI[start:stop], weight_GRI[group].t(), out_NR[start:stop]
    for group, start, stop in spans if need_wide else []:
        yield m_NR[start:stop], weight_GRI[group], dx_NI[start:stop]
    for group, start, stop in spans:
        yield m_NR[start:stop].t(), x_NI[start:stop], grad_GRI[group]


def _spans(counts_G: np.ndarray) -> Spans:
    ends = [0, *np.cumsum(counts_G).tolist()]
    return [(g, start, stop) for g, (start, stop) in enumerate(itertools.pairwise(ends)) if stop > start]
