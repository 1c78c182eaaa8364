"""Expert caches over a recorded route: how many tokens find their expert where a device holds `capacity` experts.

Shape suffixes: N requests, one expert each, in the order in which they are served.
"""

from __future__ import annotations

from collections.abc import Sequence


def lru_hits(route_N: Sequence[int], capacity: int) -> int:
    """Hits where the expert that was not asked for longest makes room."""
    held: list[int] = []
    hits = 0
    for expert in route_N:
        if expert in held:
            hits += 1
            held.remove(expert)
        elif len(held) == capacity:
            held.pop(0)
        held.append(expert)
    return hits


def belady_hits(route_N: Sequence[int], capacity: int) -> int:
    """Hits where the expert that will not be asked for longest makes room: the most that any rule has (Belady, 1966).

    A router before the layers makes it possible: the requests of a batch are known before the first is served.
    """
    held: set[int] = set()
    hits = 0
    for place, expert in enumerate(route_N):
        if expert in held:
            hits += 1
            continue
        if len(held) == capacity:
            held.remove(max(held, key=lambda one: (_next(route_N, one, place), one)))
        held.add(expert)
    return hits


def _next(route_N: Sequence[int], expert: int, place: int) -> int:
    return next((later for later in range(place + 1, len(route_N)) if route_N[later] == expert), len(route_N))
