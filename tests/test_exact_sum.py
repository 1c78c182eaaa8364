"""Order-free sums: any order and any grouping gives equal bits; the value is math.fsum's to 2^-79.

The compiled loops give the bits of the plain torch formulas.
"""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_ds.aggregation.exact import ExactSum, FloatSum
from fedmoe_ds.native.sums import loops_for

NUMBERS = st.lists(
    st.floats(-(2.0**19), 2.0**19, allow_nan=False, exclude_min=True, exclude_max=True)
    | st.floats(-1e-3, 1e-3)
    | st.floats(-1e-15, 1e-15),
    min_size=1,
    max_size=40,
)


def total(numbers: list[float], kind: type[ExactSum] | type[FloatSum] = ExactSum) -> ExactSum | FloatSum:
    sums = kind((1,))
    for number in numbers:
        sums.add(torch.tensor([number], dtype=torch.float64))
    return sums


@settings(max_examples=100, deadline=None)
@given(NUMBERS, st.randoms(use_true_random=False), st.integers(1, 5))
def test_order_and_grouping_do_not_matter(numbers: list[float], shuffle: random.Random, groups: int) -> None:
    expected = total(numbers)
    mixed = list(numbers)
    shuffle.shuffle(mixed)
    parts = [total(mixed[group::groups]) for group in range(groups)]  # what clusters and waves hold
    shuffle.shuffle(parts)
    limbs = torch.stack([part.limbs for part in parts]).sum(0)  # what the all-reduce does
    assert torch.equal(limbs, expected.limbs)
    merged = ExactSum((1,))
    merged.limbs.copy_(limbs)
    assert torch.equal(merged.value(), expected.value())


@settings(max_examples=100, deadline=None)
@given(NUMBERS)
def test_value_is_the_true_sum(numbers: list[float]) -> None:
    true = math.fsum(numbers)
    found = float(total(numbers).value())
    assert abs(found - true) <= len(numbers) * 2.0**-79 + abs(true) * 2.0**-52


@settings(max_examples=50, deadline=None)
@given(NUMBERS)
def test_float_sum_is_close(numbers: list[float]) -> None:
    size = math.fsum(map(abs, numbers))
    assert abs(float(total(numbers, FloatSum).value()) - math.fsum(numbers)) <= len(numbers) * size * 2.0**-23 + 1e-40


def test_largest_terms_do_not_overflow() -> None:
    """2^13 terms just below 2^19 on top of each other: the documented range is 2^14."""
    term = torch.full((1,), 2.0**19 * (1 - 2.0**-53), dtype=torch.float64)
    sums = ExactSum((1,))
    sums.add(term)
    sums.limbs *= 2**13
    assert float(sums.value()) == float(term) * 2**13


def test_small_weights_keep_their_precision() -> None:
    """FLAME with t = 4 weighs an expert that saw one row in a thousand by 1e-12; a mean over such weights keeps nine digits."""
    values, weights = [0.25, -0.5, 0.125], [1e-12 * 0.2, 3e-12 * 0.3, 2e-12 * 0.5]
    top = float(total([w * v for w, v in zip(weights, values, strict=True)]).value())
    bottom = float(total(weights).value())
    true = math.fsum(w * v for w, v in zip(weights, values, strict=True)) / math.fsum(weights)
    assert abs(top / bottom - true) <= 1e-9


def draw_block(seed: int, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(one client's value [3, 2, 5, 7] as a bank holds it: rows lie apart; weights [3, 2], some of them zero)."""
    source = torch.Generator().manual_seed(seed)
    bank = torch.randn(3, 2, 4, 5, 7, generator=source)
    bank *= torch.exp(-spread * torch.rand(bank.shape, generator=source))
    weight = torch.rand(3, 2, generator=source, dtype=torch.float64) ** spread
    return bank[:, :, 1], torch.where(torch.rand(3, 2, generator=source) < 0.3, 0.0, weight)


@pytest.mark.parametrize("kind", [ExactSum, FloatSum])
@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), spread=st.floats(0.1, 12.0))
def test_compiled_loops_give_the_bits_of_torch(kind: type[ExactSum] | type[FloatSum], seed: int, spread: float) -> None:
    value, weight = draw_block(seed, spread)
    assert loops_for(value) is not None, "g++ could not build sums.cpp"
    loops, plain, old = kind(value.shape), kind(value.shape), torch.randn(value.shape)
    for factor in (weight, -0.3 * weight, 1e-12 * weight):
        loops.add_product(value, factor)
        plain.add(value.double() * factor[..., None, None])
        assert torch.equal(loops.limbs, plain.limbs)
    mean = loops.mean(weight, old)
    expected = torch.where(weight[..., None, None] > 0, (plain.value() / weight[..., None, None]).float(), old)
    assert mean.dtype == torch.float32 and torch.equal(mean, expected)
    general = kind(value.shape)
    general.add_product(value.double(), weight)  # no float32: what other devices run
    once = kind(value.shape)
    once.add_product(value, weight)
    assert loops_for(value.double()) is None and torch.equal(general.limbs, once.limbs)
    assert torch.equal(general.mean(weight, old.double()).float(), once.mean(weight, old))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [ExactSum, FloatSum])
def test_a_weight_of_zero_adds_zero(kind: type[ExactSum] | type[FloatSum], dtype: torch.dtype) -> None:
    """Whatever the numbers are that nobody weighs: an expert that a client did not train may hold anything."""
    value = torch.tensor([[math.inf, math.nan], [1.0, 2.0]], dtype=dtype)
    sums = kind((2, 2))
    sums.add_product(value, torch.tensor([0.0, 0.5], dtype=torch.float64))
    assert sums.value().tolist() == [[0.0, 0.0], [0.5, 1.0]]
