"""Native kernels: equal to PyTorch in float64, and every row by itself, bit for bit.

Legend: N or T rows, G groups, I input width, O output width, D model width, F expert width, H heads, K head width.
"""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from every import every
from torch import Tensor

from fedmoe_ds.foundation.gating import GatedUnit, gated_unit
from fedmoe_ds.kernels import compiling, matrix, processor_class, rows
from fedmoe_ds.kernels.grouped_mm import grouped_mm, grouped_mm_t
from fedmoe_ds.kernels.groups import Groups
from fedmoe_ds.model import experts

WIDTHS = [(16, 32), (48, 100), (7, 5), (33, 64), (256, 96), (1024, 40), (2048, 33)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def near(found: Tensor | None, expected: Tensor, scale: float = 1.0) -> None:
    assert found is not None
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-5 * scale)


def test_the_kernels_are_there() -> None:
    assert matrix.available() and rows.available(), f"g++ is {shutil.which('g++')}, but the sources could not be built"


def test_a_wheel_holds_all_that_is_compiled() -> None:
    folder = Path(compiling.__file__).parent
    project = tomllib.loads((folder.parents[1] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["fedmoe_ds"]
    native = [path.relative_to(folder.parent) for path in folder.iterdir() if path.suffix in (".cpp", ".h")]
    assert len(native) > 5 and every(any(path.match(pattern) for pattern in patterns) for path in native)
    # And what includes a header is another source when the header changes.
    assert b"tdpbf16ps" in compiling._text(folder / "matrix.cpp")


CLASSES = [one.name for one in processor_class.CLASSES]


@pytest.fixture(params=CLASSES)
def kernel(request: pytest.FixtureRequest) -> matrix.Kernel:
    """matrix.cpp of every class of processors that can be had here."""
    # Compiled with all that a processor has: the code of the best class, where there is a better one.
    spare = request.param == "native" and len(processor_class.classes_here()) > 1
    found = None if spare else matrix.kernel_of(request.param)
    if found is None:
        pytest.skip(f"{request.param}: this processor, its compiler or its system has no such kernel")
    return found


def both_ways(w_OI: Tensor) -> list[tuple[Tensor, bool]]:
    return [(w_OI, True), (w_OI.T.contiguous(), False)]


@pytest.mark.parametrize(("wide_in", "wide_out"), WIDTHS)
def test_products_equal_float64(wide_in: int, wide_out: int, kernel: matrix.Kernel) -> None:
    """And all classes have the same bits."""
    x, w = draw(2, 17, wide_in), draw(wide_out, wide_in, seed=1)
    for weight, transposed in both_ways(w):
        found = matrix.product(x, weight, transposed, kernel)
        near(found, x.double() @ w.double().T, wide_in**0.5)
        assert found is not None and torch.equal(found, matrix.product(x, weight, transposed))  # type: ignore[arg-type]


@pytest.mark.parametrize(("wide_in", "wide_out"), WIDTHS)
def test_products_with_half_weights(wide_in: int, wide_out: int, kernel: matrix.Kernel) -> None:
    """Rows are rounded to bfloat16 as well where the class multiplies such pairs, and kept as they are elsewhere."""
    x, w = draw(43, wide_in), draw(wide_out, wide_in, seed=1).bfloat16()
    rows_ = x.bfloat16() if kernel.rounds else x
    for weight, transposed in both_ways(w):
        found = matrix.product(x, weight, transposed, kernel)
        assert found is not None and found.dtype == torch.float32
        assert (found - rows_.double() @ w.double().T).abs().max() <= 2e-5 * wide_in**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("wide_in", "wide_out"), WIDTHS)
def test_a_row_of_a_product_does_not_see_the_others(
    wide_in: int, wide_out: int, dtype: torch.dtype, kernel: matrix.Kernel
) -> None:
    x, w = draw(43, wide_in), draw(wide_out, wide_in, seed=1).to(dtype)
    for weight, transposed in both_ways(w):
        whole = matrix.product(x, weight, transposed, kernel)
        assert whole is not None
        for start in (0, 3, 11):
            for stop in range(start + 1, 37):  # every number of rows that a tile can have
                part = matrix.product(x[start:stop], weight, transposed, kernel)
                assert part is not None and torch.equal(part, whole[start:stop]), (start, stop)


def test_many_rows_go_in_pieces(kernel: matrix.Kernel) -> None:
    """More than the second cache holds at a time, and pieces of weights; a row's bits stay its own."""
    w = draw(1100, 2080, seed=1).bfloat16()
    for weight, transposed in both_ways(w):
        wide_in = weight.shape[1] if transposed else weight.shape[0]
        x = draw(300, wide_in)
        whole = matrix.product(x, weight, transposed, kernel)
        rounded = x.bfloat16() if kernel.rounds else x
        assert whole is not None
        assert (whole - rounded.double() @ w.double().T).abs().max() <= 2e-5 * wide_in**0.5
        assert torch.equal(whole[255:290], matrix.product(x[255:290], weight, transposed, kernel))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_beside_a_product_is_read_or_written(dtype: torch.dtype, kernel: matrix.Kernel) -> None:
    """Weights between what is no number, rows and weights at odd places, and groups without rows."""
    for wide_in, wide_out in ((33, 17), (64, 32), (31, 1)):
        bank = torch.full((3 * wide_out * wide_in + 9,), torch.nan).to(dtype)
        weight_GOI = bank[3 : 3 + 3 * wide_out * wide_in].view(3, wide_out, wide_in)
        weight_GOI[1] = draw(wide_out, wide_in, seed=1)
        many = torch.full((7, wide_in), torch.nan).flatten()
        x_NI = many[1 : 1 + 5 * wide_in].view(5, wide_in).copy_(draw(5, wide_in))
        ends_G = torch.tensor([0, 5, 5], dtype=torch.int32)
        y_NO = matrix.grouped_product(x_NI, weight_GOI, ends_G, True, kernel)
        assert y_NO is not None and torch.equal(y_NO, matrix.product(x_NI, weight_GOI[1], True, kernel))  # type: ignore[arg-type]
        weight_GIO = weight_GOI.view(3, wide_in, wide_out) if wide_in != wide_out else weight_GOI
        dx_NO = matrix.grouped_product(x_NI, weight_GIO, ends_G, False, kernel)
        assert dx_NO is not None and bool(dx_NO.isfinite().all()) and bool(y_NO.isfinite().all())


def test_widths_of_nothing(kernel: matrix.Kernel) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for wide_in, wide_out, count in ((0, 5, 3), (5, 0, 3), (5, 5, 0)):
            y = matrix.product(torch.ones(count, wide_in), torch.ones(wide_out, wide_in, dtype=dtype), True, kernel)
            assert y is not None and torch.equal(y, torch.full((count, wide_out), float(wide_in)))


def test_what_is_asked_for_is_refused_where_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next class is taken where the processor lacks one, or the system refuses its registers."""
    assert matrix.kernel_of("AVX1024") is None
    best = matrix.kernel()
    assert best is not None
    seen: list[str] = []

    def refused(processor: str) -> matrix.Kernel | None:
        seen.append(processor)
        return None if len(seen) == 1 else best

    monkeypatch.setattr(matrix, "kernel_of", refused)
    matrix.best.cache_clear()
    assert matrix.kernel() is best and seen == [one.name for one in processor_class.classes_here()][:2]
    matrix.best.cache_clear()
    monkeypatch.setattr(processor_class, "processor", lambda: b"flags : fpu avx2 fma\nmodel name : AMX avx512f")
    assert [one.name for one in processor_class.classes_here()] == ["AVX2", "native"]


@pytest.mark.parametrize("wide", [24, 1024])
def test_groups_of_products(wide: int) -> None:
    groups = Groups(torch.tensor([5, 5, 6, 29], dtype=torch.int32), 29)
    bank = draw(4, 3, 40, wide, seed=2)
    weight_GOI, x_NI, dy_NO = bank[:, 1], draw(29, wide), draw(29, 40, seed=3)  # a strided view, as a client's weights are
    y_NO, dx_NI = grouped_mm(x_NI, weight_GOI, groups), grouped_mm_t(dy_NO, weight_GOI, groups)
    for g, (start, stop) in enumerate([(0, 5), (5, 5), (5, 6), (6, 29)]):
        near(y_NO[start:stop], x_NI[start:stop].double() @ weight_GOI[g].double().T, wide**0.5)
        near(dx_NI[start:stop], dy_NO[start:stop].double() @ weight_GOI[g].double(), 6.0)
        assert torch.equal(y_NO[start:stop], matrix.product(x_NI[start:stop], weight_GOI[g], transposed=True))  # type: ignore[arg-type]


def test_other_kinds_are_left_to_torch() -> None:
    x, w = draw(4, 8), draw(16, 8)
    assert matrix.product(x.bfloat16(), w.bfloat16(), transposed=True) is None, "rows are float32"
    assert matrix.product(x, w.half(), transposed=True) is None
    assert matrix.product(x, draw(8, 16).T, transposed=True) is None, "weights that are not contiguous"
    assert not rows.serves(x.double()) and rows.serves(x)


@pytest.mark.parametrize("width", [16, 40, 7])
def test_norm(width: int) -> None:
    x, w, dy = draw(3, 5, width), draw(width, seed=1), draw(3, 5, width, seed=2)
    leaf = x.double().requires_grad_()
    expected = w.double() * leaf * torch.rsqrt(leaf.square().mean(-1, keepdim=True) + 1e-5)
    expected.backward(dy.double())
    y, inverse = rows.norm(x, w, 1e-5)
    near(y, expected.detach())
    assert leaf.grad is not None
    near(rows.norm_backward(dy, x, w, inverse), leaf.grad)
    alone, own = rows.norm(x[1:2].contiguous(), w, 1e-5)
    assert torch.equal(alone[0], y[1]) and torch.equal(own, inverse[5:10])


@pytest.mark.parametrize("width", [16, 64, 12])
def test_rotation(width: int) -> None:
    x, dy = draw(6, 3, width), draw(6, 3, width, seed=1)
    angles = draw(6, width // 2, seed=2).repeat(1, 2)  # both halves turn by the same angles in every model, not in this test
    cosine, sine = (angles + 0.1).cos(), (angles * 1.1).sin()
    sine[:, width // 2 :] *= 0.9
    leaf = x.double().requires_grad_()
    first, second = leaf.chunk(2, -1)
    expected = leaf * cosine.double().unsqueeze(1) + torch.cat((-second, first), -1) * sine.double().unsqueeze(1)
    expected.backward(dy.double())
    near(rows.rotate(x, cosine, sine), expected.detach())
    assert leaf.grad is not None
    near(rows.rotate(dy, cosine, sine, back=True), leaf.grad)


@pytest.mark.parametrize("width", [16, 48, 7])
def test_swiglu(width: int) -> None:
    h, p, dpa = 4.0 * draw(9, 2 * width), draw(9, seed=1).abs(), draw(9, width, seed=2)
    h[0, :4] = torch.tensor([-200.0, -90.0, 90.0, 200.0])  # beyond what e^x can hold
    leaf, weight = h.double().requires_grad_(), p.double().requires_grad_()
    gate, up = leaf.chunk(2, -1)
    expected = F.silu(gate) * up * weight.unsqueeze(-1)
    expected.backward(dpa.double())
    near(rows.swiglu(h, p), expected.detach(), 10.0)
    dh, dp = rows.swiglu_backward(h, p, dpa)
    assert leaf.grad is not None and weight.grad is not None
    near(dh, leaf.grad, 10.0)
    near(dp, weight.grad, 200.0)
    assert torch.equal(rows.swiglu(h[3:5].contiguous(), p[3:5].contiguous()), rows.swiglu(h, p)[3:5])


NAMES = ("swiglu", "geglu_tanh", "swiglu_clamped", "swiglu_oai")
UNITS = [unit for unit in (gated_unit(name, 1.702, 0.7) for name in NAMES) if unit is not None]


@pytest.mark.parametrize("unit", UNITS, ids=str)
@pytest.mark.parametrize("width", [32, 7])
def test_both_ways_through_the_feed_forward_agree(unit: GatedUnit, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And each of them treats every row by itself."""
    h, p, dpa = draw(9, 2 * width), draw(9, seed=1).abs(), draw(9, width, seed=2)

    def both_directions(some: slice) -> list[Tensor]:
        h_N2F, p_N, dpa_NF = (part[some].contiguous() for part in (h, p, dpa))
        y_NF = experts._weighted_activation(unit, h_N2F, p_N)
        return [y_NF, *experts._activation_backward(unit, h_N2F, p_N, dpa_NF.clone())]

    native = both_directions(slice(None))
    with monkeypatch.context() as patch:
        patch.setattr(rows, "serves", lambda *tensors: False)
        plain = both_directions(slice(None))
        alone = both_directions(slice(3, 5))
    for a, b in zip(native, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for whole, part in [*zip(native, both_directions(slice(3, 5)), strict=True), *zip(plain, alone, strict=True)]:
        assert torch.equal(whole[3:5], part)


@pytest.mark.parametrize("unit", UNITS, ids=str)
def test_what_is_not_a_number_stays_visible(unit: GatedUnit) -> None:
    """A limit would hide it: a comparison with NaN is false."""
    for place in (2, 20):  # in the gate, in the other half
        h, p = draw(3, 32), draw(3, seed=1).abs()
        h[1, place] = torch.nan
        for y in (experts._weighted_activation(unit, h, p), unit.weighted(h, p)):
            assert y.isnan().any(1).tolist() == [False, True, False]


SETTINGS: dict[str, Any] = {"betas": (0.9, 0.99), "eps": 1e-8}


def step(keep: float = 1.0, place: int = 0) -> rows.AdamwStep:
    return rows.AdamwStep(place, 1.0, keep, 0.7, 1e-2)


def test_adamw_leaves_alone_what_nothing_moves() -> None:
    """Without gradient, moments and decay a step changes nothing; with any of them it does."""
    shape = (2, 3, 2, 4, 40)  # layers, experts, clients, two item axes
    value = draw(*shape)
    state = [torch.zeros(shape) for _ in range(3)]
    state[0][0, 1] = 1.0
    before = value.clone()
    rows.adamw(value, *state, 2, [step(place=1)], **SETTINGS)
    moved = (value != before).any(-1).any(-1)
    assert moved.nonzero().tolist() == [[0, 1, 1]] and state[0].any(-1).any(-1).nonzero().tolist() == [[0, 1, 0]]
    before = value.clone()
    rows.adamw(value, *state, 2, [step(place=1)], **SETTINGS)  # moments alone move it
    assert (value != before).any(-1).any(-1).nonzero().tolist() == [[0, 1, 1]]
    before = value.clone()
    rows.adamw(value, *state, 2, [step(0.9, 1), step(0.9, 0)], **SETTINGS)
    assert ((value != before).any(-1).any(-1)).all(), "decay moves everything"


@pytest.mark.parametrize("size", [1, 7, 8, 31, 32, 33, 300])
def test_squares_are_summed_in_float64(size: int) -> None:
    """To its last digits, of items that lie at any place; what is not a number stays visible."""
    x = draw(3, 5, size) * 10.0 ** torch.arange(5.0).view(5, 1)
    found = rows.squared_norms(x, 1)
    torch.testing.assert_close(found, x.double().square().sum(-1), rtol=1e-14, atol=0.0)
    for place in ((0, 3), (2, 4)):
        assert torch.equal(rows.squared_norms(x[place].clone(), 1), found[place])
    x[1, 2, size // 2] = torch.nan
    assert rows.squared_norms(x, 1).isnan().nonzero().tolist() == [[1, 2]]
