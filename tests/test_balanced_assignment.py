"""Balanced assignment: the solver against brute force, against a linear program, and by its promises."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from every import every
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import linprog

from fedmoe_ds.clients import balanced_assignment
from fedmoe_ds.clients.balanced_assignment import GRAIN, balanced, load_bounds
from fedmoe_ds.clients.expert_budgets import best

QUICK = settings(max_examples=60, derandomize=True)
ROWS_4 = [np.array(bits) for bits in itertools.product([0, 1], repeat=4)]
VALUES = arrays(np.int64, (4, 4), elements=st.integers(0, 9))
BUDGETS = arrays(np.int64, 4, elements=st.integers(1, 4))
TOLERANCES = st.sampled_from([0.0, 0.1, 0.5, None])


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
@given(VALUES, BUDGETS, TOLERANCES)
def test_it_is_what_brute_force_finds(value_CE: np.ndarray, budget_C: np.ndarray, tolerance: float | None) -> None:
    lower, upper = load_bounds(budget_C, 4, tolerance)
    taken_CE = balanced(value_CE, budget_C, lower, upper)
    assert promises(taken_CE, budget_C, lower, upper)
    assert (value_CE * taken_CE).sum() == by_force(value_CE, budget_C, lower, upper)


@settings(QUICK, max_examples=30)
@given(VALUES, BUDGETS, TOLERANCES)
def test_without_prices_it_is_as_good(value_CE: np.ndarray, budget_C: np.ndarray, tolerance: float | None) -> None:
    """From wherever it starts, it ends at the optimum: prices are there for speed."""
    lower, upper = load_bounds(budget_C, 4, tolerance)
    for price_E in (np.zeros(4, dtype=np.int64), np.array([3, -5, 0, 9]) * GRAIN):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(balanced_assignment, "_prices", lambda *_, given=price_E: given)
            taken_CE = balanced(value_CE, budget_C, lower, upper)
        assert promises(taken_CE, budget_C, lower, upper)
        assert (value_CE * taken_CE).sum() == by_force(value_CE, budget_C, lower, upper)


@settings(QUICK, max_examples=15)
@given(st.integers(1, 30), st.integers(2, 9), st.sampled_from([0.0, 0.1, 0.4]), st.integers(0, 10**6))
def test_it_reaches_the_linear_program(clients: int, experts: int, tolerance: float, seed: int) -> None:
    draws = np.random.default_rng(seed)
    value_CE, budget_C = draws.random((clients, experts)) ** 3 - 0.1, draws.integers(1, experts + 1, clients)
    lower, upper = load_bounds(budget_C, experts, tolerance)
    taken_CE = balanced(value_CE, budget_C, lower, upper)
    assert promises(taken_CE, budget_C, lower, upper)
    loads = np.tile(np.eye(experts), clients)
    found = linprog(
        -value_CE.ravel(),
        A_ub=np.vstack([loads, -loads]),
        b_ub=[upper] * experts + [-lower] * experts,
        A_eq=np.repeat(np.eye(clients), experts, axis=1),
        b_eq=budget_C,
        bounds=(0, 1),
    )
    assert (value_CE * taken_CE).sum() == pytest.approx(-found.fun, abs=1e-6)


@QUICK
@given(arrays(np.float64, (7, 5), elements=st.floats(0, 1)), arrays(np.int64, 7, elements=st.integers(1, 5)))
def test_without_bounds_every_client_takes_its_best(value_CE: np.ndarray, budget_C: np.ndarray) -> None:
    taken_CE = balanced(value_CE, budget_C, *load_bounds(budget_C, 5, None))
    assert (taken_CE == best(np.rint(value_CE * GRAIN), budget_C)).all()


@QUICK
@given(st.integers(1, 12), st.integers(2, 8), st.integers(1, 8), st.integers(0, 99))
def test_equal_budgets_without_tolerance_differ_by_one(clients: int, experts: int, budget: int, seed: int) -> None:
    budget_C = np.full(clients, min(budget, experts))
    value_CE = np.random.default_rng(seed).random((clients, experts))
    load_E = balanced(value_CE, budget_C, *load_bounds(budget_C, experts, 0.0)).sum(0)
    assert load_E.max() - load_E.min() <= 1


def test_bounds_are_those_of_exact_arithmetic() -> None:
    assert load_bounds(np.full(10, 1), 1, 0.1) == (9, 10) and load_bounds(np.full(100, 2), 20, 0.1) == (9, 11)
    assert load_bounds(np.full(100, 2), 20, 0.0) == (10, 10) and load_bounds(np.array([1, 2]), 7, 0.0) == (0, 1)
    assert load_bounds(np.full(3, 2), 2, 50.0) == (0, 3) == load_bounds(np.full(3, 2), 2, None)


# What all clients like in one order, what they hardly tell apart, and what they do not tell apart at all.
CROWDS = {"one order": (1.0, 1e-3), "one order, roughly": (0.3, 0.4), "nearly equal": (0.0, 1e-3), "equal": (0.0, 0.0)}


@pytest.mark.parametrize("crowd", CROWDS)
def test_many_clients_take_few_steps(monkeypatch: pytest.MonkeyPatch, crowd: str) -> None:
    """One place beyond the bounds is a step at most; without prices to begin with there would be thousands."""
    popular, own = CROWDS[crowd]
    draws = np.random.default_rng(0)
    budget_C = draws.choice([4, 8, 16], 500)
    value_CE = np.linspace(0, popular, 64) + own * draws.random((500, 64))
    lower, upper = load_bounds(budget_C, 64, 0.1)
    steps, cheapest = 0, balanced_assignment._cheapest

    def counted(*arguments: np.ndarray) -> list[int]:
        nonlocal steps
        steps += 1
        return cheapest(*arguments)

    monkeypatch.setattr(balanced_assignment, "_cheapest", counted)
    taken_CE = balanced(value_CE, budget_C, lower, upper)
    assert promises(taken_CE, budget_C, lower, upper) and steps < 150, steps
    assert (taken_CE == balanced(value_CE.copy(), budget_C, lower, upper)).all()
