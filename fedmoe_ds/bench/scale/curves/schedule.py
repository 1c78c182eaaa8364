"""Dealing a round's participants to 128 clusters: what every rank does before every round."""

from __future__ import annotations

import time

from fedmoe_ds.bench.scale.synthetic import clients_of, sizes_of
from fedmoe_ds.config import LocalConfig
from fedmoe_ds.federation.cost import CostModel
from fedmoe_ds.federation.schedule import schedule

NAME = "schedule"
X = "participants"
POINTS = (100, 1_000, 10_000, 100_000)
WALL = "every rank deals all participants before every round: 10 000 in well below a second"
_CLUSTERS, _EP_SIZE, _IN_FLIGHT = 128, 8, 16


def measure(x: int) -> dict[str, float]:
    chosen, cost = list(clients_of(sizes_of(x))), CostModel(dense=1e9, expert=1e8, layers=16)
    began = time.perf_counter()
    plan = schedule(chosen, cost, LocalConfig(batch_size=4), _CLUSTERS, _EP_SIZE, _IN_FLIGHT)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "waves": max(len(waves) for waves in plan)}
