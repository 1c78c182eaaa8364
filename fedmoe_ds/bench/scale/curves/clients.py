"""The clients of a federation with their tiers, and who is of which tier: what every rank does at its start."""

from __future__ import annotations

import time

from fedmoe_ds.bench.scale.synthetic import clients_of, sizes_of
from fedmoe_ds.clients.client import tiers_of

NAME = "clients"
X = "clients"
POINTS = (1_000, 10_000, 100_000, 1_000_000)
WALL = "every rank holds all clients: a minute and 4 GiB at most"


def measure(x: int) -> dict[str, float]:
    sizes = sizes_of(x)
    began = time.perf_counter()
    clients = clients_of(sizes)
    made = time.perf_counter()
    tiers = tiers_of(clients)
    return {"seconds": time.perf_counter() - began, "made_s": made - began, "tiers": len(tiers)}
