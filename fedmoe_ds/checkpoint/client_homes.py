"""Client homes: which ranks keep what belongs to a client between its rounds, and how it travels to those that need it.

Legend: G clusters, W numbers of a row.

Client i is at home in cluster i mod G: every rank of that cluster keeps the client's part of the experts that it holds, and its
dense blocks. A place that follows from the number alone needs no table, and no schedule can pile clients up on one cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedmoe_ds.checkpoint.client_rows import PIECE, rows_in
from fedmoe_ds.distributed.collectives import Group, all_gather, all_to_all, broadcast
from fedmoe_ds.distributed.topology import Topology


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
            moves: none from a cluster to itself.
            read: a row that leaves from here.
            write: takes a row that arrives; it is valid until the call returns.
        """
        step = rows_in(PIECE, width)
        for start in range(0, len(moves), step):
            part = moves[start : start + step]
            # Rows lie in the order of peers in both buffers; sorting is stable, so both ends agree on the order within a peer.
            leaving = sorted((m for m in part if m.source == self.cluster), key=lambda m: m.target)
            coming = sorted((m for m in part if m.target == self.cluster), key=lambda m: m.source)
            send, receive = [0] * self.clusters, [0] * self.clusters
            for each in leaving:
                send[each.target] += 1
            for each in coming:
                receive[each.source] += 1
            found_NW = self._exchange(_stacked([read(each.client) for each in leaving], width), receive, send)
            for each, row_W in zip(coming, found_NW, strict=True):
                write(each.client, row_W)

    def collect(
        self, clients: Iterable[int], width: int, read: Callable[[int], Tensor], target: int | None = None
    ) -> dict[int, Tensor]:
        """Rows [W] of clients that have one, on all ranks, or with `target` in that cluster alone (the others get none).

        Collective over the group; every rank names the same clients in one order, and a rank gives each row of its own once. A
        rank receives twice the bytes of these rows, or 64 MiB, at most, so the caller decides how many are under way.

        Args:
            read: a row that is at home here.
        """
        theirs: dict[int, list[int]] = {}
        for client in clients:
            theirs.setdefault(self.home(client), []).append(client)
        if not theirs:
            return {}
        mine_NW = _stacked([read(client) for client in theirs.get(self.cluster, ())], width)
        if target is not None:
            return self._to_one(theirs, mine_NW, target)
        most, useful = max(map(len, theirs.values())), sum(map(len, theirs.values()))
        fits = self.clusters * most <= max(2 * useful, rows_in(PIECE, width))
        # Hops: an all-gather is one ring, a broadcast a tree for every home.
        if fits and self.clusters - 1 < len(theirs) * (self.clusters - 1).bit_length():
            # Equal parts, as an all-gather asks for: clusters that have fewer rows fill up with zeros.
            part_NW = torch.zeros(most, width)
            part_NW[: len(mine_NW)] = mine_NW
            found_GNW = self._gather(part_NW)
            return {client: found_GNW[home, i] for home, others in theirs.items() for i, client in enumerate(others)}
        found = dict[int, Tensor]()
        for home, others in sorted(theirs.items()):
            rows_NW = mine_NW if home == self.cluster else torch.empty(len(others), width)
            found |= zip(others, self._broadcast(rows_NW, home), strict=True)
        return found

    def _to_one(self, theirs: dict[int, list[int]], mine_NW: Tensor, target: int) -> dict[int, Tensor]:
        send, receive, here = [0] * self.clusters, [0] * self.clusters, self.cluster == target
        send[target] = len(mine_NW)
        for home, others in theirs.items():
            receive[home] = len(others) if here else 0
        found_NW = self._exchange(mine_NW, receive, send)
        order = [client for _, others in sorted(theirs.items()) for client in others] if here else []
        return dict(zip(order, found_NW, strict=True))

    def _gather(self, part_NW: Tensor) -> Tensor:
        """[G, N, W]."""
        return all_gather(part_NW.to(self.device), self.group, self.clusters).cpu()

    def _broadcast(self, rows_NW: Tensor, home: int) -> Tensor:
        return broadcast(rows_NW.to(self.device), self.group, home).cpu()

    def _exchange(self, rows_NW: Tensor, receive: list[int], send: list[int]) -> Tensor:
        found_NW = torch.empty(sum(receive), rows_NW.shape[1], device=self.device)
        all_to_all(found_NW, rows_NW.to(self.device), self.group, receive, send)
        return found_NW.cpu()


def _stacked(rows: list[Tensor], width: int) -> Tensor:
    """[N, W], also of no row."""
    return torch.stack(rows) if rows else torch.empty(0, width)
