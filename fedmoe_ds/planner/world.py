"""World: how many ranks there are, and which of them share a host."""

from __future__ import annotations

from dataclasses import dataclass

from fedmoe_ds.errors import UserError


@dataclass(frozen=True)
class World:
    """Ranks are numbered host by host, as every launcher does."""

    hosts: int
    ranks_per_host: int

    def __post_init__(self) -> None:
        assert self.hosts >= 1 and self.ranks_per_host >= 1, (self.hosts, self.ranks_per_host)

    @property
    def ranks(self) -> int:
        return self.hosts * self.ranks_per_host

    def host(self, rank: int) -> int:
        return rank // self.ranks_per_host

    def hosts_of(self, first: int, size: int, stride: int = 1) -> int:
        """Number of hosts over which the ranks first, first + stride, ... are spread."""
        return len({self.host(first + i * stride) for i in range(size)})


def world_of(hosts: int | None, ranks_per_host: int, ranks: int | None) -> World:
    """A world from what a user says: hosts, or ranks in all. Raises UserError where they contradict each other."""
    if ranks is None:
        return World(hosts or 1, ranks_per_host)
    per_host = ranks // hosts if hosts and ranks % hosts == 0 else min(ranks, ranks_per_host)
    if ranks % per_host or (hosts is not None and hosts * per_host != ranks):
        raise UserError(
            f"--ranks: {ranks}: not {hosts or 'a whole number of'} hosts of {per_host} ranks; use a multiple of {per_host}, or "
            "give --nodes and --gpus-per-node"
        )
    return World(ranks // per_host, per_host)
