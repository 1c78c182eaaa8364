"""Facility location: a few clients that lie near all others, chosen one by one.

    cost(S) = sum_n min_{s in S} |x_n - x_s|

Each step takes the client that lowers the cost most, of equal ones the first. The gain cost({}) - cost(S), with any constant
for cost({}) that is at least every first cost, is monotone and submodular, so what S clients gain is at least (1 - 1/e) of the
best.

Legend: N clients, D numbers about each, R candidates.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class Facilities:
    """Chosen clients, and how far from the nearest of them every client is.

    Args:
        points_ND: the clients.
    """

    def __init__(self, points_ND: Floats) -> None:
        self.points_ND = points_ND
        self.nearest_N = np.full(len(points_ND), np.inf)
        self._columns: dict[int, Floats] = {}

    def best(self, candidates: Sequence[int]) -> int:
        """The candidate that lowers the cost most: of no chosen ones the medoid."""
        costs = [float(np.minimum(self.nearest_N, self.distances_N(place)).sum()) for place in candidates]
        return candidates[int(np.argmin(costs))]

    def choose(self, place: int) -> None:
        """Take it."""
        self.nearest_N = np.minimum(self.nearest_N, self.distances_N(place))

    def distances_N(self, place: int) -> Floats:
        """From one client to all."""
        # Column by column, and no product of matrices: its bits would follow from the threads of a rank, and all ranks plan.
        if place not in self._columns:
            self._columns[place] = np.sqrt(np.square(self.points_ND - self.points_ND[place]).sum(1))
        return self._columns[place]
