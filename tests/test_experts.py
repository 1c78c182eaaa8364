"""The expert feed-forward: equal to autograd on the plain formula, and every group's bits depend on its own rows alone.

Legend: N rows, G groups, E experts, C clients, D model width, F expert width, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from deepspeed.moe.ep_experts import EXPERT_ACTIVATIONS
from every import every
from torch import Tensor

from fedmoe_ds.foundation.gating import SWIGLU, GatedUnit, gated_unit
from fedmoe_ds.kernels.grouped_mm import grouped_mm, grouped_mm_t, grouped_outer
from fedmoe_ds.kernels.groups import Groups
from fedmoe_ds.kernels.lora_products import products_for
from fedmoe_ds.model import experts as ffn


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


ALPHA, LIMIT = 1.702, 0.4
"""The limit cuts off much of what these cases compute."""


@dataclass
class Case:
    """Rows per (expert, client) with everything that a block needs."""

    rows_EC: list[list[int]]
    x_ND: Tensor
    p_N: Tensor
    dy_ND: Tensor
    w13: Tensor
    w2: Tensor
    lora: ffn.Lora
    activation: str = "swiglu"

    @property
    def unit(self) -> GatedUnit:
        unit = gated_unit(self.activation, ALPHA, LIMIT)
        assert unit is not None
        return unit

    @property
    def rows(self) -> int:
        return sum(map(sum, self.rows_EC))

    def block(self, slot: int | None) -> ffn.Block:
        per_group = torch.tensor(self.rows_EC)
        ends_E = per_group.sum(1).cumsum(0).to(torch.int32)
        ends_G = ends_E if slot is not None else per_group.flatten().cumsum(0).to(torch.int32)
        return ffn.Block(0, self.rows, slot, ends_E, ends_G)

    def experts(self) -> ffn.FrozenExperts:
        return ffn.FrozenExperts(self.w13, self.w2, self.lora, self.unit)

    def groups(self) -> list[tuple[int, int, slice]]:
        found, start = [], 0
        for expert, clients in enumerate(self.rows_EC):
            for client, rows in enumerate(clients):
                found.append((expert, client, slice(start, start + rows)))
                start += rows
        return found


def make_case(rows_EC: list[list[int]], width: int, ffn_width: int, rank: int, dtype: torch.dtype, slots: int) -> Case:
    draw = torch.Generator().manual_seed(sum(map(sum, rows_EC)) + width)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype) * 0.5

    experts, rows = len(rows_EC), sum(map(sum, rows_EC))
    shapes = [(rank, width), (2 * ffn_width, rank), (rank, ffn_width), (width, rank)]
    values = [random(experts, slots, *shape) for shape in shapes]
    products = products_for(rank, dtype, torch.device("cpu"))
    lora = ffn.Lora(*values, [torch.zeros_like(value) for value in values], 1.5, products)
    weights = random(experts, 2 * ffn_width, width), random(experts, width, ffn_width)
    return Case(rows_EC, random(rows, width), random(rows).abs(), random(rows, width), *weights, lora)


def plain(case: Case, slot: int | None, x_ND: Tensor, p_N: Tensor, lora: list[Tensor]) -> Tensor:
    """The docstring's formula, group by group, with DeepSpeed's own activation; the routing weight multiplies the result."""
    activate = EXPERT_ACTIVATIONS[case.activation].fn
    a13, b13, a2, b2 = lora
    parts = []
    for expert, client, rows in case.groups():
        place = (expert, client if slot is None else slot)
        x = x_ND[rows]
        h = x @ case.w13[expert].T + case.lora.scale * (x @ a13[place].T) @ b13[place].T
        gate, up = h.chunk(2, dim=-1)
        a = activate(gate, up, ALPHA, LIMIT)
        y = a @ case.w2[expert].T + case.lora.scale * (a @ a2[place].T) @ b2[place].T
        parts.append(y * p_N[rows, None])
    return torch.cat(parts)


# Widths that torch's grouped kernel takes (float32), and odd ones that go through the loop (float64).
SHAPES = [
    pytest.param(16, 8, 4, torch.float32, 2e-5, id="kernel"),
    pytest.param(12, 8, 2, torch.float32, 2e-5, id="rank 2"),
    pytest.param(7, 5, 3, torch.float64, 1e-12, id="loop"),
]
ROWS = [
    pytest.param([[3, 2], [0, 0], [0, 4], [1, 0]], id="some empty"),
    pytest.param([[0, 0], [0, 0], [0, 5], [0, 0]], id="one group"),
    pytest.param([[0, 0], [0, 0], [0, 0], [0, 0]], id="no rows"),
]


@pytest.mark.parametrize("rows_EC", ROWS)
@pytest.mark.parametrize(("width", "ffn_width", "rank", "dtype", "tolerance"), SHAPES)
@pytest.mark.parametrize("slot", [None, 1], ids=["all clients", "one client"])
def test_forward_and_backward_are_autograds(
    rows_EC: list[list[int]], width: int, ffn_width: int, rank: int, dtype: torch.dtype, tolerance: float, slot: int | None
) -> None:
    check_autograd(
        make_case(rows_EC if slot is None else [[sum(row)] for row in rows_EC], width, ffn_width, rank, dtype, slots=2),
        slot,
        tolerance,
    )


@pytest.mark.parametrize("activation", sorted(set(EXPERT_ACTIVATIONS) - {"swiglu"}))
@pytest.mark.parametrize(("width", "ffn_width", "rank", "dtype", "tolerance"), SHAPES)
def test_every_activation_of_deepspeed(
    activation: str, width: int, ffn_width: int, rank: int, dtype: torch.dtype, tolerance: float
) -> None:
    case = replace(make_case([[3, 2], [0, 0], [0, 4], [1, 0]], width, ffn_width, rank, dtype, slots=2), activation=activation)
    assert case.unit != SWIGLU
    tolerance *= 4  # values are larger than SwiGLU's
    check_autograd(case, None, tolerance)
    own = [torch.zeros(len(case.rows_EC), 2, *weight.shape[1:], dtype=dtype) for weight in (case.w13, case.w2)]
    values = [weight.unsqueeze(1).expand_as(grad).contiguous() for weight, grad in zip((case.w13, case.w2), own, strict=True)]
    whole = ffn.OwnExperts(values[0], values[1], own, case.unit)
    y_ND, saved = whole.forward(case.block(None), case.x_ND, case.p_N)
    dx_ND, dp_N = whole.backward(case.block(None), saved, case.dy_ND, True)
    bare = replace(case, lora=replace(case.lora, scale=0.0))
    leaves = [tensor.double().requires_grad_() for tensor in (case.x_ND, case.p_N, case.w13, case.w2)]
    wide = replace(bare, w13=leaves[2], w2=leaves[3])
    expected = plain(wide, None, leaves[0], leaves[1], [value.double() for value in lora_values(case)])
    gradients = torch.autograd.grad((expected * case.dy_ND.double()).sum(), leaves)
    for ours, theirs in zip([y_ND, dx_ND, dp_N, *(grad.sum(1) for grad in own)], [expected.detach(), *gradients], strict=True):
        assert ours is not None and float((ours.double() - theirs).abs().max()) <= tolerance


def check_autograd(case: Case, slot: int | None, tolerance: float) -> None:
    inputs = [case.x_ND, case.p_N, case.lora.a13, case.lora.b13, case.lora.a2, case.lora.b2]
    leaves = [tensor.double().clone().requires_grad_() for tensor in inputs]
    wide = replace(case, w13=case.w13.double(), w2=case.w2.double())
    expected = plain(wide, slot, leaves[0], leaves[1], leaves[2:])
    gradients = torch.autograd.grad((expected * case.dy_ND.double()).sum(), leaves, allow_unused=True)

    block = case.block(slot)
    y_ND, saved = case.experts().forward(block, case.x_ND, case.p_N)
    dx_ND, dp_N = case.experts().backward(block, saved, case.dy_ND, True)
    assert dx_ND is not None
    found = [y_ND, dx_ND, dp_N, *case.lora.grads]
    for ours, theirs in zip(found, [expected.detach(), *gradients], strict=True):
        theirs = torch.zeros_like(ours) if theirs is None else theirs
        assert float((ours.double() - theirs).abs().max() if ours.numel() else 0.0) <= tolerance


def test_gradients_add_up_over_passes() -> None:
    case = make_case([[3], [2]], 8, 8, 4, torch.float32, slots=2)
    block = case.block(0)
    for _ in range(2):
        _, saved = case.experts().forward(block, case.x_ND, case.p_N)
        case.experts().backward(block, saved, case.dy_ND, False)
    once = [grad.clone() / 2 for grad in case.lora.grads]
    for grad in case.lora.grads:
        grad.zero_()
    _, saved = case.experts().forward(block, case.x_ND, case.p_N)
    dx_ND, _ = case.experts().backward(block, saved, case.dy_ND, False)
    assert dx_ND is None, "the first layer of a model needs no gradient of its input"
    for twice, grad in zip(once, case.lora.grads, strict=True):
        assert torch.equal(twice, grad) and not bool(grad[:, 1].any()), "the other client's gradients are untouched"


def test_without_adapters() -> None:
    case = make_case([[3], [0], [2]], 8, 8, 4, torch.float32, slots=1)
    empty = [torch.zeros_like(grad) for grad in case.lora.grads]
    leaves = [case.x_ND.clone().requires_grad_(), case.p_N.clone().requires_grad_()]
    expected = plain(case, 0, *leaves, empty)
    gradients = torch.autograd.grad((expected * case.dy_ND).sum(), leaves)
    bare = ffn.FrozenExperts(case.w13, case.w2, None, case.unit)
    y_ND, saved = bare.forward(case.block(0), case.x_ND, case.p_N)
    dx_ND, dp_N = bare.backward(case.block(0), saved, case.dy_ND, True)
    for ours, theirs in zip([y_ND, dx_ND, dp_N], [expected, *gradients], strict=True):
        assert ours is not None and torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("activation", ["swiglu", "swiglu_oai"])
@pytest.mark.parametrize(
    ("rows_E", "rank", "threads"),
    [
        pytest.param([9, 1, 0, 4, 17, 2, 0, 5], 4, 1, id="few"),
        pytest.param([9, 1, 0, 4, 17, 2, 0, 5], 2, 1, id="few, rank 2"),
        pytest.param([300, 1, 97, 410, 33, 0, 256, 511], 4, 1, id="many"),
        pytest.param([300, 1, 97, 410, 33, 0, 256, 511], 4, 2, id="many, two threads"),
    ],
)
def test_a_group_does_not_see_the_others(rows_E: list[int], rank: int, threads: int, activation: str) -> None:
    """The bits of half of the experts are the same on a rank that holds all of them and on one that holds this half."""
    torch.set_num_threads(threads)
    whole = replace(make_case([[rows] for rows in rows_E], 32, 64, rank, torch.float32, slots=1), activation=activation)
    y_ND, dx_ND, dp_N = both_ways(whole, whole.block(0))
    for experts in (range(4), range(4, 8), range(1, 2)):
        start, stop = sum(rows_E[: experts.start]), sum(rows_E[: experts.stop])
        held = slice(experts.start, experts.stop)
        part = Case(
            whole.rows_EC[held],
            whole.x_ND[start:stop].clone(),
            whole.p_N[start:stop].clone(),
            whole.dy_ND[start:stop].clone(),
            whole.w13[held].clone(),
            whole.w2[held].clone(),
            ffn.Lora(
                *(value[held].clone() for value in lora_values(whole)),
                [g[held] * 0 for g in whole.lora.grads],
                1.5,
                whole.lora.products,
            ),
            activation,
        )
        for full, own in zip((y_ND, dx_ND, dp_N), both_ways(part, part.block(0)), strict=True):
            assert torch.equal(full[start:stop], own)
        for full, own in zip(whole.lora.grads, part.lora.grads, strict=True):
            assert torch.equal(full[held], own)


def lora_values(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return case.lora.a13, case.lora.b13, case.lora.a2, case.lora.b2


def both_ways(case: Case, block: ffn.Block) -> tuple[Tensor, Tensor, Tensor]:
    y_ND, saved = case.experts().forward(block, case.x_ND, case.p_N)
    dx_ND, dp_N = case.experts().backward(block, saved, case.dy_ND, True)
    assert dx_ND is not None
    return y_ND, dx_ND, dp_N


@pytest.mark.parametrize(("inner", "outer"), [(8, 12), (7, 5)], ids=["kernel", "loop"])
def test_grouped_products(inner: int, outer: int) -> None:
    draw = torch.Generator().manual_seed(0)
    groups = Groups(torch.tensor([3, 3, 4, 9, 9], dtype=torch.int32), 9)
    x_NI = torch.randn(9, inner, generator=draw)
    weight_GOI = torch.randn(5, outer, inner, generator=draw)
    y_NO, dx_NI, outer_GOI = grouped_mm(x_NI, weight_GOI, groups), None, None
    dx_NI, outer_GOI = grouped_mm_t(y_NO, weight_GOI, groups), grouped_outer(y_NO, x_NI, groups)
    start = 0
    for group, stop in enumerate(groups.ends_G.tolist()):
        rows = slice(start, stop)
        assert torch.allclose(y_NO[rows], x_NI[rows] @ weight_GOI[group].T, atol=1e-5)
        assert torch.allclose(dx_NI[rows], y_NO[rows] @ weight_GOI[group], atol=1e-4)
        assert torch.allclose(outer_GOI[group], y_NO[rows].T @ x_NI[rows], atol=1e-4)
        start = stop
    assert not bool(outer_GOI[[1, 4]].any()), "an empty group has no gradient"


@pytest.fixture
def memory_of_nan() -> Iterator[None]:
    """Memory that nobody has written yet is NaN."""
    guard = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), guard.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    guard.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    guard.fill_uninitialized_memory = before[1]


@pytest.mark.parametrize("activation", ["swiglu", "swiglu_oai"])
@pytest.mark.parametrize("rows_EC", ROWS)
@pytest.mark.parametrize(("width", "ffn_width", "rank", "dtype", "tolerance"), SHAPES)
@pytest.mark.parametrize("slot", [None, 1], ids=["all clients", "one client"])
@pytest.mark.usefixtures("memory_of_nan")
def test_an_expert_without_rows_leaves_nothing_unwritten(
    rows_EC: list[list[int]],
    width: int,
    ffn_width: int,
    rank: int,
    dtype: torch.dtype,
    tolerance: float,
    slot: int | None,
    activation: str,
) -> None:
    rows_EC = rows_EC if slot is None else [[sum(row)] for row in rows_EC]
    case = replace(make_case(rows_EC, width, ffn_width, rank, dtype, slots=2), activation=activation)
    own = [torch.zeros(len(rows_EC), 2, *weight.shape[1:], dtype=dtype) for weight in (case.w13, case.w2)]
    weights = [weight.unsqueeze(1).repeat(1, 2, 1, 1) for weight in (case.w13, case.w2)]
    for experts in (case.experts(), ffn.OwnExperts(weights[0], weights[1], own, case.unit)):
        y_ND, saved = experts.forward(case.block(slot), case.x_ND, case.p_N)
        found = [y_ND, *experts.backward(case.block(slot), saved, case.dy_ND, True)]
        assert every(part is not None and bool(part.isfinite().all()) for part in found)
    assert every(bool(grad.isfinite().all()) for grad in (*case.lora.grads, *own))
    for expert, row in enumerate(rows_EC):
        if not sum(row):
            assert not any(bool(grad[expert].any()) for grad in (*case.lora.grads, *own))
