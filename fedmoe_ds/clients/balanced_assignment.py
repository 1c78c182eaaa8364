"""Balanced assignment: which clients hold which experts, when experts must not be held by too many nor by too few.

Legend: C clients, E experts of a layer, N nodes of the graph (the experts, then the sink), R ranks in an order.

    maximise sum v_ce x_ce   over x in {0, 1}   with   sum_e x_ce = k_c   and   lower <= sum_c x_ce <= upper

This is a flow from clients over experts to a sink, so the linear program's constraint matrix is totally unimodular and its best
vertex is integral. It is solved in whole numbers, by successive shortest paths: a linear-programming library takes values
within its tolerance to be equal, and would break such ties differently on other processors.

Experts have prices, and every client takes the k_c experts that are worth most to it beyond their price. An expert with a price
above zero sends `upper` clients on to the sink, one below zero `lower`, others as many as they have within the bounds. Whatever
the prices are, no exchange of experts by any clients can then gain, and only what experts have beyond what they send on is out
of balance. Each step moves some of it along the cheapest chain of exchanges: clients give up expert e for e', others give up e'
for e'', and so on; the sink takes what the bounds admit. Cheapest chains leave no exchange that gains, so the end is the
optimum. Prices come first because they are what makes it fast: near the optimal ones little is out of balance.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

from fedmoe_ds.clients.expert_budgets import best

FAR = 2**60
"""The length of no way at all; sums of a few do not overflow, and no chain of values below 2^40 is half as long."""
GRAIN = 2**30
"""Values are rounded to multiples of 1 / GRAIN: whole numbers add and compare alike everywhere."""
MOST = 2**40
"""Prices stay within it: a client that has all experts would pay any."""
TURNS = 8
"""How often prices are changed; more of them leave hardly less to be moved."""


def load_bounds(budget_C: np.ndarray, experts: int, tolerance: float | None) -> tuple[int, int]:
    """floor((1 - d) m) and ceil((1 + d) m) holders of an expert, m = sum_c k_c / E; None: any number."""
    if tolerance is None:
        return 0, len(budget_C)
    mean = float(np.sum(budget_C)) / experts
    # Some assignment always fits: k_c / E of every expert for every client does, and so does a vertex beside it.
    # The small number undoes a product's rounding: 1.1 x 10 are eleven.
    lower, upper = np.floor((1 - tolerance) * mean + 1e-9), np.ceil((1 + tolerance) * mean - 1e-9)
    return max(0, int(lower)), min(len(budget_C), int(upper))


def balanced(value_CE: np.ndarray, budget_C: np.ndarray, lower: int, upper: int) -> np.ndarray:
    """The best assignment, bool [C, E]; values are below 2^10, and some assignment keeps the bounds."""
    value_CE = np.rint(value_CE * GRAIN).astype(np.int64)
    price_E = _prices(value_CE, budget_C, lower, upper)
    flow = _Flow(value_CE, best(value_CE - price_E, budget_C), price_E, lower, upper)
    while (surplus_N := flow.surplus_N()).any():
        flow.push(_cheapest(flow.cost_NN, surplus_N), surplus_N)
    return flow.taken_CE()


def _prices(value_CE: np.ndarray, budget_C: np.ndarray, lower: int, upper: int) -> np.ndarray:
    """Prices under which loads are nearly within their bounds, int64 [E]: coordinate descent on the dual, all at once."""
    experts = value_CE.shape[1]
    price_E, far_1E = np.zeros(experts, dtype=np.int64), np.full((1, experts), FAR)
    # The sink's price is one for all: it is where as many experts are above it as must be at their upper bound.
    dearest = min(experts - 1, (int(budget_C.sum()) - experts * lower) // max(1, upper - lower))
    for _ in range(TURNS):
        worth_CE = value_CE - price_E
        ranked_CE = np.pad(-np.sort(-worth_CE, axis=1), ((0, 0), (0, 1)), constant_values=-FAR)
        last_C1, next_C1 = np.take_along_axis(ranked_CE, budget_C[:, None] + [[-1, 0]], axis=1).T[..., None]
        # The price above which a client leaves an expert, below which it takes it: what its place would else be worth.
        turn_CE = value_CE - np.where(worth_CE >= last_C1, next_C1, last_C1)
        turn_RE = np.concatenate([far_1E, -np.sort(-turn_CE, axis=0), -far_1E])
        # Between the r-th largest of them and the next, exactly r clients stay.
        high_E, low_E = ((turn_RE[count] + turn_RE[count + 1]) // 2 for count in (upper, lower))
        dear_E, cheap_E = turn_RE[upper + 1] > 0, turn_RE[lower] < 0
        price_E = np.where(dear_E, high_E, np.where(cheap_E, low_E, 0)).clip(-MOST, MOST)
        price_E -= np.sort(price_E)[-1 - dearest]
    return price_E


class _Flow:
    """An assignment, and what every expert sends on to the sink; `cost_NN` is what the cheapest exchange costs."""

    def __init__(self, value_CE: np.ndarray, taken_CE: np.ndarray, price_E: np.ndarray, lower: int, upper: int) -> None:
        self.lower, self.upper, self.sink = lower, upper, len(price_E)
        load_E = taken_CE.sum(0)
        self.sent_E = np.where(price_E > 0, upper, np.where(price_E < 0, lower, load_E.clip(lower, upper)))
        self.value_EC, taken_EC = np.ascontiguousarray(value_CE.T), taken_CE.T
        # What a client loses with an expert that it has, and gains with one that it lacks.
        self.loss_EC = np.where(taken_EC, self.value_EC, FAR)
        self.gain_EC = np.where(taken_EC, -FAR, self.value_EC)
        self.cost_NN = np.full((self.sink + 1, self.sink + 1), FAR)
        self._renew(range(self.sink))

    def taken_CE(self) -> np.ndarray:
        taken_CE: np.ndarray = self.loss_EC.T < FAR
        return taken_CE

    def surplus_N(self) -> np.ndarray:
        """What comes to a node beyond what it sends on."""
        over_E = (self.loss_EC < FAR).sum(1) - self.sent_E
        return np.append(over_E, -over_E.sum())

    def push(self, path: list[int], surplus_N: np.ndarray) -> None:
        """Move as much along a cheapest path as all of it admits at the same cost."""
        arcs = list(pairwise(path))
        movers = [self._movers(*arc) for arc in arcs]
        amount = min(int(surplus_N[path[0]]), -int(surplus_N[path[-1]]), *map(len, movers))
        for (here, there), able in zip(arcs, movers, strict=True):
            if there == self.sink:
                self.sent_E[here] += amount
            elif here == self.sink:
                self.sent_E[there] -= amount
            else:
                who = able[:amount]
                self.loss_EC[here, who], self.gain_EC[here, who] = FAR, self.value_EC[here, who]
                self.loss_EC[there, who], self.gain_EC[there, who] = self.value_EC[there, who], -FAR
        self._renew(node for node in path if node != self.sink)

    def _movers(self, here: int, there: int) -> Sequence[int] | np.ndarray:
        """Clients whose exchange is the cheapest; of the sink, as many places as it has."""
        if there == self.sink:
            return range(self.upper - int(self.sent_E[here]))
        if here == self.sink:
            return range(int(self.sent_E[there]) - self.lower)
        return np.flatnonzero(self.loss_EC[here] - self.gain_EC[there] == self.cost_NN[here, there])

    def _renew(self, changed: Iterable[int]) -> None:
        """Costs from and to experts that have changed."""
        for one in changed:
            self.cost_NN[one, :-1] = (self.loss_EC[one] - self.gain_EC).min(1)
            self.cost_NN[:-1, one] = (self.loss_EC - self.gain_EC[one]).min(1)
        self.cost_NN[:-1, -1] = np.where(self.sent_E < self.upper, 0, FAR)
        self.cost_NN[-1, :-1] = np.where(self.sent_E > self.lower, 0, FAR)


def _cheapest(cost_NN: np.ndarray, surplus_N: np.ndarray) -> list[int]:
    """The nodes of a shortest way from a surplus to a lack, by Bellman and Ford: some costs are negative, no circle is."""
    length_N, before_N = np.where(surplus_N > 0, 0, FAR), np.full(len(cost_NN), -1)
    while True:
        way_NN = length_N[:, None] + cost_NN
        # A length beyond half of FAR is that of no way: a negative cost from there shortens nothing that is one.
        nearer_N = way_NN.min(0) < length_N
        if not nearer_N.any():
            break
        length_N = np.where(nearer_N, way_NN.min(0), length_N)
        before_N = np.where(nearer_N, way_NN.argmin(0), before_N)
    node = int(np.where(surplus_N < 0, length_N, 2 * FAR).argmin())
    assert length_N[node] < FAR // 2, "no assignment keeps the bounds"
    path = [node]
    while before_N[path[0]] >= 0:
        path.insert(0, int(before_N[path[0]]))
    return path
