"""Scheduling: which cluster and wave trains whom.

Every rank computes the same schedule from the same numbers. Placement balances predicted cost; it can change how long a round
takes, never what comes out of it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

from fedmoe_ds.clients.client import Client
from fedmoe_ds.clients.local_training import Wave
from fedmoe_ds.config import LocalConfig
from fedmoe_ds.federation.cost import CostModel


def home_clients(in_flight: int | None, participants_per_round: int, ep_size: int) -> int:
    """Client slots per rank: the clients in flight on a cluster, dealt to its ranks."""
    most = participants_per_round if in_flight is None else min(in_flight, participants_per_round)
    # Rounded up: a slot may stay empty, but every client of a wave needs one.
    return max(1, math.ceil(most / ep_size))


def schedule(
    chosen: Sequence[Client], cost: CostModel, local: LocalConfig, clusters: int, ep_size: int, in_flight: int | None
) -> list[list[Wave]]:
    """Deal clients to clusters, and each cluster's clients to waves and ranks.

    Clusters: longest predicted work first onto the least loaded cluster. Waves: neighbours in that order share a wave, so that
    a wave's clients finish close together. Ranks: boustrophedon, so that every rank of the cluster gets a fair part.
    Returns, for each cluster, its waves.
    """
    predicted = {client.index: cost.client(client, local) for client in chosen}
    # Longest first (Graham's LPT rule) takes at most 4/3 of the best makespan. By index among equals.
    ordered = sorted(chosen, key=lambda client: (-predicted[client.index], client.index))
    # Ties go to the lower cluster, so that every rank deals alike.
    heap = [(0.0, cluster) for cluster in range(clusters)]
    dealt: list[list[Client]] = [[] for _ in range(clusters)]
    for client in ordered:
        load, cluster = heapq.heappop(heap)
        dealt[cluster].append(client)
        heapq.heappush(heap, (load + predicted[client.index], cluster))
    return [_waves(mine, ep_size, in_flight or max(len(chosen), 1)) for mine in dealt]


def _waves(clients: list[Client], ep_size: int, in_flight: int) -> list[Wave]:
    waves = []
    for start in range(0, len(clients), in_flight):
        homes: Wave = [[] for _ in range(ep_size)]
        for i, client in enumerate(clients[start : start + in_flight]):
            turn, place = divmod(i, ep_size)
            homes[place if turn % 2 == 0 else ep_size - 1 - place].append(client)
        waves.append(homes)
    return waves
