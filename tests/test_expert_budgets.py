"""Which experts clients hold: searches and solvers against brute force, against a linear program, and by their promises."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from every import every
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import linprog

from fedmoe_ds.clients.balanced_assignment import GRAIN, balanced, load_bounds, whole
from fedmoe_ds.clients.expert_budgets import add_best, best, cover, drop_worst, scattered

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


ROWS_4 = [np.array(bits) for bits in itertools.product([0, 1], repeat=4)]


def by_force(value_CE: np.ndarray, budget_C: np.ndarray, lower: int, upper: int) -> int:
    """The most that four clients reach with four experts; load vectors of the first clients are kept with their best value."""
    reached = {(0, 0, 0, 0): 0}
    for value_E, budget in zip(value_CE.tolist(), budget_C.tolist(), strict=True):
        following: dict[tuple[int, ...], int] = {}
        for load, total in reached.items():
            for row in (row for row in ROWS_4 if row.sum() == budget):
                key, gained = tuple((np.array(load) + row).tolist()), total + int(row @ value_E)
                following[key] = max(following.get(key, -1), gained)
        reached = following
    return max(total for load, total in reached.items() if lower <= min(load) and max(load) <= upper)


def promises(taken_CE: np.ndarray, budget_C: np.ndarray, lower: int, upper: int) -> bool:
    load_E = taken_CE.sum(0)
    return taken_CE.dtype == bool and every([*(taken_CE.sum(1) == budget_C), *(load_E >= lower), *(load_E <= upper)])


@QUICK
@given(
    arrays(np.int64, (4, 4), elements=SCORES),
    arrays(np.int64, 4, elements=st.integers(1, 4)),
    st.sampled_from([0.0, 0.1, 0.5, None]),
)
def test_balanced_is_what_brute_force_finds(value_CE: np.ndarray, budget_C: np.ndarray, tolerance: float | None) -> None:
    lower, upper = load_bounds(budget_C, 4, tolerance)
    taken_CE = balanced(value_CE, budget_C, lower, upper)
    assert promises(taken_CE, budget_C, lower, upper)
    assert (value_CE * taken_CE).sum() == by_force(value_CE, budget_C, lower, upper)


@settings(max_examples=15, derandomize=True)
@given(st.integers(1, 30), st.integers(2, 9), st.sampled_from([0.0, 0.1, 0.4]), st.integers(0, 10**6))
def test_balanced_reaches_the_linear_program(clients: int, experts: int, tolerance: float, seed: int) -> None:
    draws = np.random.default_rng(seed)
    value_CE, budget_C = whole(draws.random((clients, experts)) ** 3), draws.integers(1, experts + 1, clients)
    lower, upper = load_bounds(budget_C, experts, tolerance)
    taken_CE = balanced(value_CE, budget_C, lower, upper)
    assert promises(taken_CE, budget_C, lower, upper)
    loads = np.tile(np.eye(experts), clients)
    found = linprog(
        -value_CE.ravel() / GRAIN,
        A_ub=np.vstack([loads, -loads]),
        b_ub=[upper] * experts + [-lower] * experts,
        A_eq=np.repeat(np.eye(clients), experts, axis=1),
        b_eq=budget_C,
        bounds=(0, 1),
    )
    assert (value_CE * taken_CE).sum() / GRAIN == pytest.approx(-found.fun, abs=1e-6)


@QUICK
@given(arrays(np.float64, (7, 5), elements=st.floats(0, 1)), arrays(np.int64, 7, elements=st.integers(1, 5)))
def test_without_bounds_every_client_takes_its_best(value_CE: np.ndarray, budget_C: np.ndarray) -> None:
    taken_CE = balanced(whole(value_CE), budget_C, *load_bounds(budget_C, 5, None))
    assert (taken_CE == best(whole(value_CE), budget_C)).all()
    for value_E, taken_E, budget in zip(whole(value_CE).tolist(), taken_CE, budget_C, strict=True):
        assert sorted(range(5), key=lambda e: (-value_E[e], e))[:budget] == sorted(
            np.flatnonzero(taken_E).tolist(), key=lambda e: (-value_E[e], e)
        )


@QUICK
@given(st.integers(1, 12), st.integers(2, 8), st.integers(1, 8), st.integers(0, 99))
def test_equal_budgets_without_tolerance_differ_by_one(clients: int, experts: int, budget: int, seed: int) -> None:
    budget_C = np.full(clients, min(budget, experts))
    value_CE = whole(np.random.default_rng(seed).random((clients, experts)))
    load_E = balanced(value_CE, budget_C, *load_bounds(budget_C, experts, 0.0)).sum(0)
    assert load_E.max() - load_E.min() <= 1


def test_many_clients_take_little_time_and_equal_values_have_one_answer() -> None:
    # 200 clients that all want the same four of 64: every place beyond the bound is a step of its own.
    budget_C = np.full(200, 4)
    value_CE = np.zeros((200, 64), dtype=np.int64)
    taken_CE = balanced(value_CE, budget_C, *load_bounds(budget_C, 64, 0.1))
    assert promises(taken_CE, budget_C, 11, 14)
    assert (taken_CE == balanced(value_CE, budget_C, 11, 14)).all()
