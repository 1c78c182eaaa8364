"""Facility location by one client after the other, against all choices."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_ds.clients.facility_location import Facilities


def points(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3))


def cost(points_ND: np.ndarray, chosen: tuple[int, ...]) -> float:
    return sum(min(math.dist(one, points_ND[place]) for place in chosen) for one in points_ND)


def greedy(points_ND: np.ndarray, count: int) -> list[int]:
    facilities, chosen = Facilities(points_ND), list[int]()
    for _ in range(count):
        chosen.append(facilities.best([place for place in range(len(points_ND)) if place not in chosen]))
        facilities.choose(chosen[-1])
    return chosen


@settings(max_examples=30, derandomize=True)
@given(st.integers(0, 10**6), st.integers(2, 9))
def test_the_first_is_the_medoid_and_each_lowers_the_cost_most(seed: int, count: int) -> None:
    points_ND = points(seed, count)
    chosen = greedy(points_ND, count)
    assert sorted(chosen) == list(range(count))
    for step, place in enumerate(chosen[:-1]):
        before = tuple(chosen[:step])
        costs = {other: cost(points_ND, (*before, other)) for other in range(count) if other not in before}
        assert costs[place] <= min(costs.values()) + 1e-9


@settings(max_examples=30, derandomize=True)
@given(st.integers(0, 10**6))
def test_what_three_of_eight_gain_is_near_the_best(seed: int) -> None:
    """Likeness is what is left of the largest distance."""
    points_ND = points(seed, 8)
    most = 8 * max(math.dist(one, other) for one in points_ND for other in points_ND)
    gain = most - cost(points_ND, tuple(greedy(points_ND, 3)))
    best = max(most - cost(points_ND, chosen) for chosen in combinations(range(8), 3))
    assert (1 - 1 / math.e) * best <= gain <= best + 1e-9


def test_equals_go_by_index() -> None:
    facilities = Facilities(np.array([[0.0], [1.0], [0.0], [1.0]]))
    assert facilities.best([0, 1, 2, 3]) == 0 and facilities.best([3, 2, 1]) == 3
    facilities.choose(2)
    assert facilities.best([0, 1, 3]) == 1
