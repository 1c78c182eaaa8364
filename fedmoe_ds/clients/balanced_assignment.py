"""Balanced assignment: which clients hold which experts, when experts must not be held by too many nor by too few.

Legend: C clients, E experts of a layer, N nodes of the graph: the experts, then the sink.

    maximise sum v_ce x_ce   over x in {0, 1}   with   sum_e x_ce = k_c   and   lower <= sum_c x_ce <= upper

This is a flow from clients over experts to a sink, so the linear program's constraint matrix is totally unimodular and its best
vertex is integral. It is solved in whole numbers, by successive shortest paths: a linear-programming library takes values
within its tolerance to be equal, and would break such ties differently on other processors.

Without bounds on loads, every client takes its best k_c. No exchange of experts by any clients can then gain, and only experts
beyond the bounds are out of balance. Each step moves one of them along the cheapest chain of exchanges: client c gives up
expert e for e', another gives up e' for e'', and so on; the sink takes the loads that the bounds admit. Cheapest chains leave
no exchange that gains, so the end is the optimum.
"""

from __future__ import annotations

import numpy as np

from fedmoe_ds.clients.expert_budgets import best

FAR = 2**60
"""The length of no way at all; sums of two do not overflow, and no chain of values below 2^40 is as long."""
GRAIN = 2**30
"""Values are whole multiples of 1 / GRAIN."""


def whole(value_CE: np.ndarray) -> np.ndarray:
    """Values as whole numbers, which add and compare alike everywhere."""
    return np.rint(value_CE * GRAIN).astype(np.int64)


def load_bounds(budget_C: np.ndarray, experts: int, tolerance: float | None) -> tuple[int, int]:
    """floor((1 - d) m) and ceil((1 + d) m) holders of an expert, m = sum_c k_c / E; None: any number."""
    if tolerance is None:
        return 0, len(budget_C)
    mean = float(np.sum(budget_C)) / experts
    # Some assignment always fits: k_c / E of every expert for every client does, and so does a vertex beside it.
    return max(0, int(np.floor((1 - tolerance) * mean))), min(len(budget_C), int(np.ceil((1 + tolerance) * mean)))


def balanced(value_CE: np.ndarray, budget_C: np.ndarray, lower: int, upper: int) -> np.ndarray:
    """The best assignment, bool [C, E]. Whole values below 2^40; bounds that some assignment keeps."""
    experts = value_CE.shape[1]
    taken_CE = best(value_CE, budget_C)
    accepted_E = np.clip(taken_CE.sum(0), lower, upper)  # what flows from each expert to the sink
    cost_NN, who_EE = np.full((experts + 1, experts + 1), FAR), np.zeros((experts, experts), dtype=np.int64)
    _update(value_CE, taken_CE, cost_NN, who_EE, np.arange(experts))
    while True:
        over_E = taken_CE.sum(0) - accepted_E
        surplus_N = np.append(over_E, -over_E.sum())
        if not surplus_N.any():
            return taken_CE
        cost_NN[:-1, -1] = np.where(accepted_E < upper, 0, FAR)
        cost_NN[-1, :-1] = np.where(accepted_E > lower, 0, FAR)
        path = _cheapest(cost_NN, surplus_N > 0, surplus_N < 0)
        for here, there in zip(path, path[1:], strict=False):
            if there == experts:
                accepted_E[here] += 1
            elif here == experts:
                accepted_E[there] -= 1
            else:
                taken_CE[who_EE[here, there], [here, there]] = False, True
        _update(value_CE, taken_CE, cost_NN, who_EE, np.array([node for node in path if node < experts]))


def _update(value_CE: np.ndarray, taken_CE: np.ndarray, cost_NN: np.ndarray, who_EE: np.ndarray, changed: np.ndarray) -> None:
    """What an exchange of an expert for another costs at least and who makes it, from and to experts that have changed."""
    for one in changed:
        for gives, rows in ((True, (one, slice(None, -1))), (False, (slice(None, -1), one))):
            lost_CE = (value_CE[:, [one]] - value_CE) * (1 if gives else -1)
            able_CE = (taken_CE[:, [one]] == gives) & (taken_CE != gives)
            cost_CE = np.where(able_CE, lost_CE, FAR)
            cost_NN[rows] = cost_CE.min(0)
            who_EE[(one, slice(None)) if gives else (slice(None), one)] = cost_CE.argmin(0)


def _cheapest(cost_NN: np.ndarray, source_N: np.ndarray, target_N: np.ndarray) -> list[int]:
    """The nodes of a shortest way from a source to a target, by Bellman and Ford: some costs are negative, no circle is."""
    length_N, before_N = np.where(source_N, 0, FAR), np.full(len(cost_NN), -1)
    while True:
        # What is far away stays as far: a negative cost from there must not look like a way.
        far_NN = (length_N[:, None] >= FAR) | (cost_NN >= FAR)
        way_NN = np.where(far_NN, FAR, length_N[:, None] + cost_NN)
        nearer_N = way_NN.min(0) < length_N
        if not nearer_N.any():
            break
        length_N = np.where(nearer_N, way_NN.min(0), length_N)
        before_N = np.where(nearer_N, way_NN.argmin(0), before_N)
    node = int(np.where(target_N, length_N, 2 * FAR).argmin())
    assert length_N[node] < FAR, "no assignment keeps the bounds"
    path = [node]
    while before_N[path[0]] >= 0:
        path.insert(0, int(before_N[path[0]]))
    return path
