"""Network: seconds and bytes of the collectives of a round, from alpha and beta of the links that a group of ranks uses.

Bytes are those that a rank hands over, its own part included, as the tallies of `fedmoe_ds.distributed.activity` count them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedmoe_ds.distributed.gloo_control import gather_hops
from fedmoe_ds.planner.hardware import Hardware, Link, Links
from fedmoe_ds.planner.world import World

Amount = Any
"""A number, or float64 [n]."""


@dataclass
class Traffic:
    """All calls of one collective in a round, on one rank.

    `inside` and `between` are the bytes that cross links within hosts and between them, the mean over the ranks of the group.
    """

    calls: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0
    inside: float = 0.0
    between: float = 0.0

    def add(self, calls: float, size: float, seconds: float, shares: tuple[float, float]) -> None:
        """Calls with `size` bytes in all, of which each crosses links so many times (`wire_shares`)."""
        self.calls, self.bytes, self.seconds = self.calls + calls, self.bytes + size, self.seconds + seconds
        self.inside, self.between = self.inside + shares[0] * size, self.between + shares[1] * size


@dataclass(frozen=True)
class Group:
    """Ranks of one collective: how many, and over how many hosts."""

    size: int
    hosts: int

    @classmethod
    def cluster(cls, world: World, ep_size: int) -> Group:
        """The widest spread cluster of the world."""
        # Clusters may straddle hosts unequally; all meet at the aggregation, so the slowest decides.
        worst = max((world.hosts_of(c * ep_size, ep_size) for c in range(world.ranks // ep_size)), default=1)
        return cls(ep_size, worst)

    @classmethod
    def shard(cls, world: World, ep_size: int) -> Group:
        """The ranks of one expert shard, in all clusters."""
        # Shard 0 stands for all: the others are the same pattern, moved by a few ranks.
        return cls(world.ranks // ep_size, world.hosts_of(0, world.ranks // ep_size, ep_size))

    @classmethod
    def everyone(cls, world: World) -> Group:
        return cls(world.ranks, world.hosts)


@dataclass
class Network:
    """Collectives on one kind of machine; adds up what it is asked for."""

    hardware: Hardware
    world: World
    traffic: dict[str, Traffic] = field(default_factory=dict)

    @property
    def crowding(self) -> float:
        """On CPU the cores that compute also carry messages: more ranks than cores slow both down."""
        if self.hardware.kind != "cpu":
            return 1.0
        return max(1.0, self.world.ranks_per_host / self.hardware.slots)

    def _book(self, name: str, group: Group, calls: float, size: float, each: float) -> float:
        if group.size == 1:
            return 0.0
        seconds = calls * each * self.crowding
        # Calls of one rank: every rank of a group books the same ones.
        self.traffic.setdefault(name, Traffic()).add(calls, calls * size, seconds, wire_shares(name, group))
        return seconds

    def all_to_all_seconds(self, group: Group, size: Amount) -> Amount:
        """Seconds of one exchange of `size` bytes per rank, split evenly among the peers."""
        if group.size == 1:
            return 0.0 * size
        links, peers = self.hardware.network.all_to_all, group.size - 1
        link = _slowest(links, group)
        # Peers on the same host, apart from this rank.
        near = min(peers, math.ceil(group.size / group.hosts) - 1)
        each = size / group.size
        moving = near * each / links.intra.bytes_per_s
        if group.hosts > 1:
            # Both links work at the same time, so the slower one counts and not the sum.
            moving = np.maximum(moving, (peers - near) * each / links.inter.bytes_per_s)
        return link.alpha_s + link.peer_s * (peers - 1) + moving

    def all_gather_seconds(self, group: Group, size: Amount) -> Amount:
        """Seconds of one gather of every rank's `size` bytes by everybody."""
        return _gathered(self.hardware.network.all_to_all, group, size)

    def control_seconds(self, group: Group, size: Amount) -> Amount:
        """The same among hosts' processes, beside the devices: a tree where there are many."""
        return _gathered(self.hardware.network.control, group, size, gather_hops(group.size))

    def all_to_all(self, group: Group, calls: float, size: float) -> float:
        """Book `calls` exchanges of `size` bytes per rank; their seconds."""
        return self._book("all_to_all", group, calls, size, float(self.all_to_all_seconds(group, size)))

    def all_gather(self, group: Group, calls: float, size: float) -> float:
        """Book `calls` gathers of every rank's `size` bytes; their seconds."""
        return self._book("all_gather", group, calls, size, float(self.all_gather_seconds(group, size)))

    def all_reduce(self, group: Group, calls: float, size: float) -> float:
        """Sum of `size` bytes: every rank sends and receives 2 (n - 1) / n of them."""
        link = _slowest(self.hardware.network.all_reduce, group)
        share = 2.0 * (group.size - 1) / group.size
        # Latency grows with the depth of a tree; bytes are those of a ring.
        turns = math.ceil(math.log2(group.size))
        each = link.alpha_s + link.peer_s * (turns - 1) + share * size / link.bytes_per_s
        return self._book("all_reduce", group, calls, size, each)

    def control(self, group: Group, calls: float, size: float) -> float:
        """Host-side messages: every rank's `size` bytes to everybody."""
        return self._book("control", group, calls, size, float(self.control_seconds(group, size)))


def wire_shares(name: str, group: Group) -> tuple[float, float]:
    """How often a byte that a rank hands over crosses links inside hosts, and between them, in one collective by its name."""
    size, near = group.size, math.ceil(group.size / group.hosts)
    if name == "all_to_all":  # an even part for every rank, its own included
        return (near - 1) / size, (size - near) / size
    # Rings, host by host: one rank of each host sends to another host.
    turns = 2.0 * (size - 1) / size if name == "all_reduce" else size - 1.0
    crossing = group.hosts / size if group.hosts > 1 else 0.0
    return turns * (1.0 - crossing), turns * crossing


def _gathered(links: Links, group: Group, size: Amount, hops: int | None = None) -> Amount:
    """A ring of all ranks, or so many hops."""
    if group.size == 1:
        return 0.0 * size
    link, peers = _slowest(links, group), group.size - 1
    turns = (peers if hops is None else hops) - 1
    return link.alpha_s + link.peer_s * turns + peers * size / link.bytes_per_s


def _slowest(links: Links, group: Group) -> Link:
    return links.inter if group.hosts > 1 else links.intra
