"""Which experts clients hold: searches against brute force, and by their promises."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedmoe_ds.clients.expert_budgets import add_best, cover, drop_worst, scattered

QUICK = settings(max_examples=60, derandomize=True)
SCORES = st.integers(0, 9)


def subsets(layers: int, experts: int) -> list[np.ndarray]:
    return [np.array(bits).reshape(layers, experts) for bits in itertools.product([False, True], repeat=layers * experts)]


ALL_2x6 = np.stack(subsets(2, 6))


@QUICK
@given(arrays(np.int64, (2, 6), elements=SCORES), st.integers(1, 3), st.integers(0, 6))
def test_cover_is_what_brute_force_finds(score_LE: np.ndarray, least: int, more: int) -> None:
    slots = 2 * least + more
    fits = (ALL_2x6.sum((1, 2)) <= slots) & (ALL_2x6.sum(2).min(1) >= least)
    expected = (ALL_2x6[fits] * score_LE).sum(2).min(1).max()
    theta, held_LE = cover(score_LE.astype(float), slots, least)
    assert theta == expected
    assert (held_LE * score_LE).sum(1).min() >= theta
    assert held_LE.sum() <= slots and held_LE.sum(1).min() >= least


@QUICK
@given(arrays(np.float64, (3, 5), elements=st.floats(0, 1)), st.integers(1, 4))
def test_theta_grows_with_the_budget(score_LE: np.ndarray, least: int) -> None:
    thetas = [cover(score_LE, slots, least)[0] for slots in range(3 * least, 16)]
    assert thetas == sorted(thetas)
    # Sums of a layer in two orders differ by rounding.
    assert thetas[-1] == pytest.approx(score_LE.sum(1).min())


def test_cover_gives_most_to_the_layer_whose_scores_are_flat() -> None:
    score_LE = np.array([[0.25, 0.25, 0.25, 0.25], [0.9, 0.06, 0.03, 0.01]])
    theta, held_LE = cover(score_LE, 5, 1)
    assert theta == 0.9 and held_LE.tolist() == [[True] * 4, [True, False, False, False]]


@QUICK
@given(arrays(np.int64, (3, 4), elements=SCORES), st.integers(0, 12), st.randoms(use_true_random=False))
def test_more_and_fewer(value_LE: np.ndarray, count: int, draws: Any) -> None:
    held_LE = np.array([[draws.random() < 0.5 for _ in range(4)] for _ in range(3)])
    more = add_best(held_LE, value_LE.astype(float), count)
    new = more & ~held_LE
    assert (more >= held_LE).all() and new.sum() == min(count, (~held_LE).sum())
    if new.any() and not more.all():
        assert value_LE[new].min() >= value_LE[~more].max()
    fewer = drop_worst(held_LE, value_LE.astype(float), count, 1)
    assert (fewer <= held_LE).all()
    assert fewer.sum() == max(held_LE.sum() - count, held_LE.any(1).sum())
    assert (fewer.any(1) == held_LE.any(1)).all()


def test_the_worst_go_first_and_ties_by_index() -> None:
    held_LE, value_LE = np.ones((2, 3), dtype=bool), np.array([[3.0, 1.0, 1.0], [5.0, 2.0, 0.5]])
    assert drop_worst(held_LE, value_LE, 2, 1).tolist() == [[True, True, False], [True, True, False]]
    assert drop_worst(held_LE, value_LE, 9, 2).tolist() == [[True, True, False], [True, True, False]]
    assert add_best(~held_LE, np.ones((2, 3)), 4).tolist() == [[True, True, True], [True, False, False]]


@QUICK
@given(st.integers(1, 3), st.integers(0, 9), st.integers(0, 99))
def test_scattered_fills_its_slots(least: int, more: int, seed: int) -> None:
    slots = min(3 * least + more, 15)
    held_LE = scattered(np.random.default_rng(seed).random((3, 5)), slots, least)
    assert held_LE.sum() == slots and held_LE.sum(1).min() >= least
