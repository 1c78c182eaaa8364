"""Order-free sums: any order and any grouping gives equal bits; the value is math.fsum's to 2^-47 of the largest term.

The compiled loops give the bits of the plain torch formulas.
"""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedmoe_ds.aggregation.exact_sum import DIGIT_BITS, MOST_TERMS, ORIGIN, WEIGHT_BITS, ExactSum, FloatSum
from fedmoe_ds.kernels.sums import loops_for

NUMBERS = st.lists(
    (st.floats(-(2.0**100), 2.0**100) | st.floats(-1e-3, 1e-3) | st.floats(-1e-15, 1e-15) | st.floats(-1e-190, 1e-190)).filter(
        lambda number: number == 0 or abs(number) >= 2.0**-WEIGHT_BITS
    ),
    min_size=1,
    max_size=40,
)


def total(numbers: list[float], kind: type[ExactSum] | type[FloatSum] = ExactSum) -> ExactSum | FloatSum:
    sums = kind((1,), 1)
    for number in numbers:
        sums.add_product(torch.ones(1, dtype=torch.float64), torch.tensor([number], dtype=torch.float64))
    return sums


@settings(max_examples=100, deadline=None)
@given(NUMBERS, st.randoms(use_true_random=False), st.integers(1, 5))
def test_order_and_grouping_do_not_matter(numbers: list[float], shuffle: random.Random, groups: int) -> None:
    expected = total(numbers)
    mixed = list(numbers)
    shuffle.shuffle(mixed)
    parts = [total(mixed[group::groups]) for group in range(groups)]  # what clusters and waves hold
    shuffle.shuffle(parts)
    window = torch.stack([part.windows for part in parts]).amax(0)  # what ranks agree on
    for part in parts:
        part.raise_to(window)
    limbs = torch.stack([part.limbs for part in parts]).sum(0)  # what the all-reduce does
    assert torch.equal(limbs, expected.limbs) and torch.equal(window, expected.windows)
    merged = ExactSum((1,), 1)
    merged.limbs.copy_(limbs)
    merged.windows.copy_(window)
    assert torch.equal(merged.value(), expected.value())


@settings(max_examples=100, deadline=None)
@given(NUMBERS)
def test_value_is_the_true_sum(numbers: list[float]) -> None:
    true, largest = math.fsum(numbers), max(map(abs, numbers))
    found = float(total(numbers).value())
    assert abs(found - true) <= len(numbers) * largest * 2.0**-47 + abs(true) * 2.0**-52


@settings(max_examples=50, deadline=None)
@given(NUMBERS)
def test_float_sum_is_close(numbers: list[float]) -> None:
    size = math.fsum(map(abs, numbers))
    assert abs(float(total(numbers, FloatSum).value()) - math.fsum(numbers)) <= len(numbers) * size * 2.0**-23


@pytest.mark.parametrize("exponent", [-800, 0, 47, 800])
def test_most_terms_do_not_overflow(exponent: int) -> None:
    """As many clients as a round may have, each with the largest digits there are."""
    term = 2.0**exponent * (1 - 2.0**-53)
    sums = total([term])
    sums.limbs *= MOST_TERMS
    assert float(sums.value()) == pytest.approx(term * MOST_TERMS, rel=1e-15)
    worst = torch.full((1,), 2 ** (DIGIT_BITS - 1)) * MOST_TERMS
    assert int(worst) == 2 ** (DIGIT_BITS - 1) * MOST_TERMS < 2**63, "a digit is at most 2^47"


TERMS = st.lists(
    st.tuples(st.floats(0.5, 1.0, exclude_max=True), st.sampled_from([-1, 1]), st.integers(0, 60), st.integers(1, MOST_TERMS)),
    min_size=1,
    max_size=5,
)
BELOW_ONE = 1 - 2.0**-53


@settings(max_examples=100, deadline=None)
@given(TERMS, st.integers(-12, 12))
@example([(BELOW_ONE, 1, 0, 1)], 0)
@example([(BELOW_ONE, -1, 0, 1)], 3)
def test_as_many_terms_as_there_may_be_add_up_like_whole_numbers(drawn: list[tuple[float, int, int, int]], window: int) -> None:
    """MOST_TERMS terms in one window, up to its bound: how often each comes is drawn, and the last one fills the sum up."""
    sums, high, low, left = ExactSum((1,), 1), 0, 0, MOST_TERMS
    for place, (mantissa, sign, drop, times) in enumerate(drawn):
        waiting = len(drawn) - 1 - place
        times = min(times, left - waiting) if waiting else left
        left -= times
        weight = sign * math.ldexp(mantissa, DIGIT_BITS * (window + 1) + ORIGIN - 1 - drop)
        one = ExactSum((1,), 1)
        one.add_product(torch.tensor([BELOW_ONE], dtype=torch.float64), torch.tensor([weight], dtype=torch.float64))
        for part in (one, sums):
            part.raise_to(torch.tensor([window]))
        sums.limbs += one.limbs * times  # of integers: as adding them one by one
        scaled = Fraction(BELOW_ONE * weight) / Fraction(2) ** (DIGIT_BITS * window + ORIGIN)
        high, low = high + times * round(scaled), low + times * round((scaled - round(scaled)) * 2**DIGIT_BITS)
    assert left == 0 and sums.limbs.flatten().tolist() == [high, low] and int(sums.windows) == window, "a digit has overflown"
    true = (high + Fraction(low, 2**DIGIT_BITS)) * Fraction(2) ** (DIGIT_BITS * window + ORIGIN)
    bound = (abs(high) + Fraction(abs(low), 2**DIGIT_BITS)) * Fraction(2) ** (DIGIT_BITS * window + ORIGIN - 51)
    assert abs(Fraction(float(sums.value())) - true) <= bound


def draw_block(seed: int, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(one client's value [3, 2, 5, 7] as a bank holds it: rows lie apart; weights [3, 2], some of them zero)."""
    source = torch.Generator().manual_seed(seed)
    bank = torch.randn(3, 2, 4, 5, 7, generator=source)
    bank *= torch.exp(-spread * torch.rand(bank.shape, generator=source))
    weight = torch.rand(3, 2, generator=source, dtype=torch.float64) ** spread
    return bank[:, :, 1], torch.where(torch.rand(3, 2, generator=source) < 0.3, 0.0, weight)


@pytest.mark.parametrize("kind", [ExactSum, FloatSum])
@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), spread=st.floats(0.1, 60.0))
def test_compiled_loops_give_the_bits_of_torch(kind: type[ExactSum] | type[FloatSum], seed: int, spread: float) -> None:
    """float64 values take the way of other devices."""
    value, weight = draw_block(seed, spread)
    assert loops_for(value) is not None, "g++ could not build sums.cpp"
    assert loops_for(value.double()) is None
    loops, plain, old = kind(value.shape, 2), kind(value.shape, 2), torch.randn(value.shape)
    whole = kind(weight.shape, 2)
    for factor in (1e-30 * weight, weight, -0.3 * weight, 1e-12 * weight, 1e90 * weight, 1e-160 * weight):
        loops.add_product(value, factor)
        plain.add_product(value.double(), factor)
        whole.add_product(torch.ones_like(weight), factor.abs())
        assert torch.equal(loops.windows, plain.windows) and torch.equal(loops.limbs, plain.limbs)
    mean = loops.mean(whole, old)
    assert mean.dtype == torch.float32 and torch.equal(mean, plain.mean(whole, old.double()).float())
    assert torch.equal(mean[weight == 0], old[weight == 0]) and mean.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [ExactSum, FloatSum])
def test_a_weight_of_zero_adds_zero(kind: type[ExactSum] | type[FloatSum], dtype: torch.dtype) -> None:
    """Whatever the numbers are that nobody weighs; where somebody does, they must be finite."""
    value = torch.tensor([[math.inf, math.nan], [1.0, 2.0]], dtype=dtype)
    sums = kind((2, 2), 1)
    sums.add_product(value, torch.tensor([0.0, 0.5], dtype=torch.float64))
    assert sums.value().tolist() == [[0.0, 0.0], [0.5, 1.0]]
    for row in (0, 1):
        with pytest.raises(ArithmeticError, match="not finite"):
            kind((1, 1), 1).add_product(value[:1, row : row + 1], torch.tensor([1e-200], dtype=torch.float64))
