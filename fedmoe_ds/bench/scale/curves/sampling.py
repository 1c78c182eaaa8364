"""Drawing a round's participants, by every way of sampling."""

from __future__ import annotations

import time

from fedmoe_ds.bench.scale.synthetic import SEED, clients_of, sizes_of
from fedmoe_ds.federation.sampling import participants

NAME = "sampling"
X = "clients"
POINTS = (1_000, 10_000, 100_000, 1_000_000)
WALL = "one draw of 1 % of the clients on every rank: a minute; a round waits for it"
_SHARE = 0.01


def measure(x: int) -> dict[str, float]:
    clients = clients_of(sizes_of(x))
    spent = {}
    for sampling in ("uniform", "size", "budget"):
        began = time.perf_counter()
        chosen = participants(clients, _SHARE, SEED, 1, sampling)
        spent[f"{sampling}_s"] = time.perf_counter() - began
    return {"seconds": max(spent.values()), "drawn": len(chosen), **spent}
