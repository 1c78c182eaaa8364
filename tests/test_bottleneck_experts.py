"""Experts that clients own whole: the bottleneck adapters and fully trained experts equal autograd on the plain formula.

Legend: N rows, G groups, E experts, C clients, D model width, H expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedmoe_ds.model.bottleneck_experts import BottleneckExperts
from fedmoe_ds.model.experts import Block, Experts, OwnExperts

SLOTS, SCALE = 3, 0.5


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


Make = Callable[[Tensor, Tensor, list[Tensor]], Experts]
Plain = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain_bottleneck(x_ND: Tensor, inner_HD: Tensor, outer_DH: Tensor) -> Tensor:
    return F.gelu(x_ND @ inner_HD.T) @ outer_DH.T


def plain_linear(x_ND: Tensor, inner_HD: Tensor, outer_DH: Tensor) -> Tensor:
    return x_ND @ inner_HD.T @ outer_DH.T


def plain_own(x_ND: Tensor, w13_2HD: Tensor, w2_DH: Tensor) -> Tensor:
    gate_NH, up_NH = (x_ND @ w13_2HD.T).chunk(2, dim=-1)
    return (F.silu(gate_NH) * up_NH) @ w2_DH.T


KINDS: dict[str, tuple[Make, Plain, int]] = {
    "bottleneck": (BottleneckExperts, plain_bottleneck, 1),
    "linear": (partial(BottleneckExperts, linear=True), plain_linear, 1),
    "own": (OwnExperts, plain_own, 2),
}
"""How to make the experts, one expert's formula, and matrices side by side in the first product."""


class Case:
    """Random rows for random group sizes, some of them empty, and every client's own weights."""

    def __init__(
        self, kind: str, rows_EC: list[list[int]], width: int, hidden: int, dtype: torch.dtype, weights: torch.dtype
    ) -> None:
        make, self.plain, fold = KINDS[kind]
        draw = torch.Generator().manual_seed(width + sum(map(sum, rows_EC)))

        def random(*shape: int, dtype: torch.dtype) -> Tensor:
            return (torch.randn(*shape, generator=draw, dtype=torch.float64) * SCALE).to(dtype)

        self.rows_EC, rows, experts = rows_EC, sum(map(sum, rows_EC)), len(rows_EC)
        self.x_ND, self.dy_ND = random(rows, width, dtype=dtype), random(rows, width, dtype=dtype)
        self.p_N = random(rows, dtype=dtype).abs()
        self.first = random(experts, SLOTS, fold * hidden, width, dtype=weights)
        self.second = random(experts, SLOTS, width, hidden, dtype=weights)
        self.grads = [torch.zeros_like(self.first), torch.zeros_like(self.second)]
        self.experts = make(self.first, self.second, self.grads)

    def block(self, slot: int | None) -> Block:
        """All rows: of the client `slot`, or of all clients where it is None."""
        rows_EC = torch.tensor(self.rows_EC)
        ends_E = rows_EC.sum(1).cumsum(0).to(torch.int32)
        return Block(0, len(self.x_ND), slot, ends_E, ends_E if slot is not None else _ends(rows_EC.flatten()))

    def run(self, slot: int | None, need_dx: bool = True) -> list[Tensor | None]:
        """y, dx, dp."""
        block = self.block(slot)
        y_ND, saved = self.experts.forward(block, self.x_ND, self.p_N)
        return [y_ND, *self.experts.backward(block, saved, self.dy_ND, need_dx)]

    def by_autograd(self, slot: int | None) -> list[Tensor]:
        """y, dx, dp and the gradients of both weights in float64, one group at a time."""
        leaves = [tensor.double().clone().requires_grad_() for tensor in (self.x_ND, self.p_N, self.first, self.second)]
        x_ND, p_N, first, second = leaves
        parts, start = [], 0
        for expert, clients in enumerate(self.rows_EC):
            for client, count in enumerate(clients):
                rows, place = slice(start, start + count), (expert, client if slot is None else slot)
                parts.append(p_N[rows, None] * self.plain(x_ND[rows], first[place], second[place]))
                start += count
        y_ND = torch.cat(parts)
        return [y_ND.detach(), *torch.autograd.grad((y_ND * self.dy_ND.double()).sum(), leaves)]


def _ends(counts: Tensor) -> Tensor:
    return counts.cumsum(0).to(torch.int32)


def random_rows(seed: int, experts: int, clients: int) -> list[list[int]]:
    """Up to six rows per group, and two groups or more without any."""
    draw = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 7, (experts, clients), generator=draw)
    counts.view(-1)[torch.randperm(counts.numel(), generator=draw)[:2]] = 0
    return counts.tolist()  # type: ignore[no-any-return]


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max()) if found.numel() else 0.0


# Widths that torch's grouped kernel takes (it knows no float64), and odd ones that go through the loop.
SHAPES = [
    pytest.param(16, 8, torch.float32, 1e-5, id="float32"),
    pytest.param(16, 1, torch.float32, 1e-5, id="one wide"),
    pytest.param(7, 5, torch.float64, 1e-12, id="loop"),
]


@pytest.mark.parametrize("slot", [None, 2], ids=["all clients", "one client"])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("width", "hidden", "dtype", "tolerance"), SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_backward_are_autograds(
    kind: str, width: int, hidden: int, dtype: torch.dtype, tolerance: float, seed: int, slot: int | None
) -> None:
    rows_EC = random_rows(seed, 5, SLOTS if slot is None else 1)
    case = Case(kind, rows_EC, width, hidden, dtype, dtype)
    expected = case.by_autograd(slot)
    for ours, theirs in zip([*case.run(slot), *case.grads], expected, strict=True):
        assert ours is not None and difference(ours, theirs) <= tolerance
    for grad in case.grads:
        assert bool(grad.any())
        used = (torch.tensor(rows_EC) > 0) if slot is None else torch.zeros(len(rows_EC), SLOTS, dtype=torch.bool)
        if slot is not None:
            used[:, slot] = torch.tensor(rows_EC).sum(1) > 0
        assert not bool(grad[~used].any()), "an expert without rows, and every other client, has no gradient"


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows(kind: str) -> None:
    for slot in (None, 0):
        case = Case(kind, [[0] * (SLOTS if slot is None else 1)] * 4, 16, 8, torch.float32, torch.float32)
        y_ND, dx_ND, dp_N = case.run(slot)
        assert y_ND is not None and dx_ND is not None and dp_N is not None
        assert y_ND.shape == dx_ND.shape == (0, 16) and dp_N.shape == (0,)
        assert not any(bool(grad.any()) for grad in case.grads)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_add_up_over_passes(kind: str) -> None:
    case = Case(kind, [[3], [0], [4]], 16, 8, torch.float32, torch.float32)
    once = case.run(1)
    first = [grad.clone() for grad in case.grads]
    y_ND, dx_ND, dp_N = case.run(1, need_dx=False)
    assert dx_ND is None, "the first layer of a model needs no gradient of its input"
    assert y_ND is not None and dp_N is not None and once[0] is not None and once[2] is not None
    assert torch.equal(y_ND, once[0]) and torch.equal(dp_N, once[2])
    for twice, grad in zip(case.grads, first, strict=True):
        assert torch.equal(twice, 2 * grad)


@pytest.mark.parametrize("slot", [None, 0], ids=["all clients", "one client"])
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_rows_with_float32_experts(kind: str, slot: int | None) -> None:
    """What a bfloat16 foundation sends: the weights' and the gradients' own precision stays float32."""
    case = Case(kind, random_rows(4, 5, SLOTS if slot is None else 1), 32, 16, torch.bfloat16, torch.float32)
    expected = case.by_autograd(slot)
    found = [*case.run(slot), *case.grads]
    assert [tensor.dtype for tensor in found if tensor is not None] == [torch.bfloat16] * 3 + [torch.float32] * 2
    for ours, theirs in zip(found, expected, strict=True):
        assert ours is not None
        assert float((ours.double() - theirs).norm() / theirs.norm()) <= 0.02


@pytest.mark.parametrize(
    ("kind", "hidden"),
    [*((kind, hidden) for kind in KINDS for hidden in (4, 8, 12, 16, 20)), ("linear", 1), ("linear", 3), ("bottleneck", 2)],
)
def test_bits_do_not_depend_on_the_experts_beside(kind: str, hidden: int) -> None:
    """A rank that holds some of the experts computes the bits of one that holds all: no loop over rows ends differently."""
    rows_EC = [[9], [1], [0], [4], [17], [2], [0], [5]]
    whole = Case(kind, rows_EC, 32, hidden, torch.float32, torch.float32)
    together = whole.run(0)
    for held in (slice(0, 4), slice(4, 8), slice(1, 2), slice(3, 6)):
        part = Case(kind, rows_EC[held], 32, hidden, torch.float32, torch.float32)
        rows = slice(sum(map(sum, rows_EC[: held.start])), sum(map(sum, rows_EC[: held.stop])))
        part.x_ND, part.dy_ND, part.p_N = (t[rows].clone() for t in (whole.x_ND, whole.dy_ND, whole.p_N))
        part.first.copy_(whole.first[held])
        part.second.copy_(whole.second[held])
        for full, own in zip(together, part.run(0), strict=True):
            assert full is not None and own is not None and torch.equal(full[rows], own)
        for full, own in zip(whole.grads, part.grads, strict=True):
            assert torch.equal(full[held], own)
