"""Order-free sums: any order and any grouping gives equal bits; the value is math.fsum's to 2^-79."""

from __future__ import annotations

import math
import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_ds.aggregation.exact import ExactSum, FloatSum

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
