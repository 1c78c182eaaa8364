"""Scheduling: which cluster and wave trains whom, and how many client slots that takes.

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
from fedmoe_ds.federation.run_spec import RunSpec
from fedmoe_ds.federation.sampling import buffered, participant_count
from fedmoe_ds.model.client_slots import home_of

LOOKED_AHEAD = 100_000
"""Clients among which `wave_slots` draws, over all rounds that it deals: seconds of a start (`scale --curves schedule`)."""


def participants_per_round(spec: RunSpec, clients: int) -> int:
    """Clients that train in a round; one where the method pools the data of all."""
    if (buffer := buffered(spec.config, clients)) is not None:
        return buffer
    return participant_count(1 if spec.method.pooled else clients, spec.config.federation.participation)


def wave_slots(spec: RunSpec, clients: Sequence[Client], clusters: int) -> int:
    """Clients in flight on a cluster at most: as many as configured, or as any cluster gets in a round, where that is less.

    Rounds are dealt as they will be, as many as `LOOKED_AHEAD` allows. A cluster that gets more in a later one, or in what is
    left of an interrupted one, trains them in one more wave.
    """
    drawn, config = participants_per_round(spec, len(clients)), spec.config
    most = min(config.execution.clients_in_flight or drawn, drawn)
    # The fullest cluster has the mean at least, so no round need be dealt to know that every slot is used.
    if math.ceil(drawn / clusters) >= most:
        return most
    # Where all take part every round is dealt like the first.
    rounds = 1 if drawn == len(clients) else min(config.federation.rounds, max(1, LOOKED_AHEAD // len(clients)))
    dealt = (_deal(spec.drawn_among(clients, index), spec.cost, config.local, clusters) for index in range(1, rounds + 1))
    return min(most, max(len(mine) for one_round in dealt for mine in one_round))


def largest_wave(plan: list[list[Wave]]) -> int:
    """Clients of the largest wave of any cluster; the first of each cluster is its largest."""
    return max((sum(map(len, waves[0])) for waves in plan if waves), default=0)


def schedule(
    chosen: Sequence[Client], cost: CostModel, local: LocalConfig, clusters: int, ep_size: int, in_flight: int | None
) -> list[list[Wave]]:
    """Deal clients to clusters, and each cluster's clients to waves and ranks.

    Clusters: longest predicted work first onto the least loaded cluster. Waves: neighbours in that order share a wave, so that
    a wave's clients finish close together. Ranks: there and back again, so that every rank of the cluster gets a fair part.
    Returns, for each cluster, its waves.
    """
    dealt = _deal(chosen, cost, local, clusters)
    return [_waves(mine, ep_size, in_flight or max(len(chosen), 1)) for mine in dealt]


def _deal(chosen: Sequence[Client], cost: CostModel, local: LocalConfig, clusters: int) -> list[list[Client]]:
    """The clients of each cluster, longest first; with fewer clients than clusters the last clusters get none."""
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
    return dealt


def _waves(clients: list[Client], ep_size: int, in_flight: int) -> list[Wave]:
    waves = []
    for start in range(0, len(clients), in_flight):
        homes: Wave = [[] for _ in range(ep_size)]
        for i, client in enumerate(clients[start : start + in_flight]):
            homes[home_of(i, ep_size)[0]].append(client)
        waves.append(homes)
    return waves
