"""World: how many ranks there are, and which of them share a host."""

from __future__ import annotations

from dataclasses import dataclass

from fedmoe_ds.errors import UserError
from fedmoe_ds.planner.hardware import Hardware


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
        # Enumerated: a stride may skip hosts, so neither end of the range tells.
        return len({self.host(first + i * stride) for i in range(size)})


def world_of(hosts: int | None, per_host: int | None, ranks: int | None, hardware: Hardware) -> World:
    """A world from what a user says; what is left out follows from the machine.

    `ranks` alone fill hosts of `slots` ranks; a calibration knows one host, so they share it.

    Raises:
        UserError: the numbers contradict each other, or more ranks than devices on a host that nobody asked for.
    """
    if ranks is None:
        return World(hosts or 1, per_host or hardware.slots)
    each = per_host or _each(hosts, ranks, hardware)
    # Every host has as many ranks: the models of links and of shared cores rest on it.
    if ranks % each or (hosts is not None and hosts * each != ranks):
        raise UserError(
            f"--ranks: {ranks}: not {hosts or 'a whole number of'} hosts of {each} ranks; use a multiple of {each}, or change "
            "--nodes or --gpus-per-node"
        )
    # On CPU more ranks than cores are slow but work; a device serves one rank.
    if per_host is None and hardware.kind == "cuda" and each > hardware.slots:
        raise UserError(
            f"--ranks: {ranks}: {each} ranks on each of {ranks // each} hosts, and {hardware.name} has {hardware.slots} "
            f"devices; use --nodes {-(-ranks // hardware.slots)}, or say --gpus-per-node {each}"
        )
    return World(ranks // each, each)


def _each(hosts: int | None, ranks: int, hardware: Hardware) -> int:
    """Ranks of a host where only hosts or ranks are known."""
    if hosts is None:
        # A calibration describes this one machine; a table entry a host of a cluster.
        return ranks if hardware.measured else min(ranks, hardware.slots)
    if ranks % hosts:
        raise UserError(f"--ranks: {ranks}: cannot be dealt evenly to {hosts} hosts; use a multiple of {hosts}")
    return ranks // hosts
