"""Client homes: which ranks keep what belongs to a client between its rounds, and how it travels to those that need it.

Legend: G clusters, W numbers of a row.

Client i is at home in cluster i mod G: every rank of that cluster keeps the client's part of the experts that it holds, and its
dense blocks. A place that follows from the number alone needs no table, and no schedule can pile clients up on one cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedmoe_ds.distributed.collectives import Group, all_to_all
from fedmoe_ds.distributed.topology import Topology

_PIECE = 1 << 26
"""Bytes of rows that a rank receives at once."""


@dataclass(frozen=True)
class Move:
    """One client's row on its way from one cluster to another."""

    client: int
    source: int
    target: int


@dataclass(frozen=True)
class Homes:
    """Where clients are at home, seen from one rank. By default from the only one.

    Attributes:
        group: the ranks of this shard in all clusters, by cluster.
        device: what travels over the group lies there.
    """

    clusters: int = 1
    cluster: int = 0
    shards: int = 1
    shard: int = 0
    group: Group = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def of(cls, topology: Topology, device: torch.device) -> Homes:
        layout = topology.layout
        return cls(layout.clusters, topology.cluster, layout.ep_size, topology.shard, topology.edp_group, device)

    def home(self, client: int) -> int:
        """The cluster where a client is at home."""
        return client % self.clusters

    def is_here(self, client: int) -> bool:
        return self.home(client) == self.cluster

    def move(
        self, moves: Sequence[Move], width: int, read: Callable[[int], Tensor], write: Callable[[int, Tensor], None]
    ) -> None:
        """Bring rows [W] from cluster to cluster. Collective over the group; every rank names the same moves in one order.

        Args:
            moves: none from a cluster to itself; those of one client are neighbours.
            read: a row that leaves from here.
            write: takes a row that arrives; it is valid until the call returns.
        """
        for part in _pieces(moves, max(1, _PIECE // max(4 * width, 1))):
            # Rows lie in the order of peers in both buffers; sorting is stable, so both ends agree on the order within a peer.
            leaving = sorted((m for m in part if m.source == self.cluster), key=lambda m: m.target)
            coming = sorted((m for m in part if m.target == self.cluster), key=lambda m: m.source)
            send, receive = [0] * self.clusters, [0] * self.clusters
            for each in leaving:
                send[each.target] += 1
            for each in coming:
                receive[each.source] += 1
            rows_NW = torch.stack([read(each.client) for each in leaving]) if leaving else torch.empty(0, width)
            found_NW = torch.empty(len(coming), width, device=self.device)
            all_to_all(found_NW, rows_NW.to(self.device), self.group, receive, send)
            for each, row_W in zip(coming, found_NW.cpu(), strict=True):
                write(each.client, row_W)


def _pieces(moves: Sequence[Move], clients: int) -> list[list[Move]]:
    """Moves of at most so many clients each."""
    found: list[list[Move]] = []
    seen, last = 0, None
    for each in moves:
        if each.client != last:
            seen, last = seen + 1, each.client
        if (seen - 1) // clients >= len(found):
            found.append([])
        found[-1].append(each)
    return found
