"""Topology: world = clusters x ep_size.

Rank r plays in cluster r // ep_size and holds expert shard r % ep_size. A cluster is one DeepSpeed expert-parallel group
(token all-to-all during local training); the ranks that hold the same shard in all clusters are one expert-data-parallel
group (the one all-reduce per round). `ParallelLayout` is arithmetic and needs no process group; `Topology` adds the groups.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as torch_dist

from fedmoe_ds.config import TopologyConfig
from fedmoe_ds.distributed import process_groups
from fedmoe_ds.distributed.activity import activity
from fedmoe_ds.distributed.collectives import ControlSumming, Summing, TorchSumming, name_group
from fedmoe_ds.distributed.control import Control
from fedmoe_ds.distributed.mpi_control import MpiControl, mpi_world
from fedmoe_ds.distributed.runtime import Runtime
from fedmoe_ds.errors import UserError
from fedmoe_ds.machine import host_facts


@dataclass(frozen=True)
class ParallelLayout:
    """Who is where, for any world size."""

    world_size: int
    ep_size: int

    def __post_init__(self) -> None:
        if self.world_size % self.ep_size:
            fits = [d for d in range(1, self.world_size + 1) if self.world_size % d == 0]
            raise UserError(
                f"topology.ep_size: {self.ep_size}: the world of {self.world_size} ranks is not divisible by it; "
                f"use ep_size in {fits} or start a multiple of {self.ep_size} ranks"
            )

    @property
    def clusters(self) -> int:
        return self.world_size // self.ep_size

    def cluster(self, rank: int) -> int:
        return rank // self.ep_size

    def shard(self, rank: int) -> int:
        return rank % self.ep_size

    def cluster_ranks(self, cluster: int) -> range:
        """The ranks of a cluster."""
        return range(cluster * self.ep_size, (cluster + 1) * self.ep_size)

    def shard_ranks(self, shard: int) -> range:
        """The ranks that hold an expert shard, one of each cluster."""
        return range(shard, self.world_size, self.ep_size)

    def experts(self, rank: int, num_experts: int) -> range:
        """Global ids of the experts that a rank holds."""
        if num_experts % self.ep_size:
            fits = [d for d in range(1, num_experts + 1) if num_experts % d == 0]
            raise UserError(
                f"topology.ep_size: {self.ep_size}: the model's {num_experts} experts do not divide by it; use one of {fits}"
            )
        local = num_experts // self.ep_size
        return range(self.shard(rank) * local, (self.shard(rank) + 1) * local)

    def table(self, num_experts: int, hosts: list[str]) -> list[dict[str, int | str]]:
        """One row per rank: rank, host, cluster, shard, experts."""
        rows: list[dict[str, int | str]] = []
        for rank in range(self.world_size):
            held = self.experts(rank, num_experts)
            span = f"{held.start}-{held.stop - 1}" if held else "none"
            rows.append(
                {
                    "rank": rank,
                    "host": hosts[rank],
                    "cluster": self.cluster(rank),
                    "shard": self.shard(rank),
                    "experts": span,
                }
            )
        return rows


def format_table(rows: list[dict[str, int | str]]) -> str:
    """The rank table as aligned text."""
    header = list(rows[0])
    cells = [header] + [[str(row[key]) for key in header] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in cells)


@dataclass(frozen=True)
class Topology:
    """The layout of this world with this rank's place in it and its process groups (None in a world of one).

    Attributes:
        ep_group: the ranks of this cluster (token all-to-all).
        edp_group: the ranks that hold the same expert shard, in all clusters.
        sum_cluster, sum_shard: the sums of aggregation over these two.
        control: the host-side communicator of this cluster.
        machines: what every host is (`machine.host_facts`).
    """

    layout: ParallelLayout
    rank: int
    hosts: list[str]
    ep_group: torch_dist.ProcessGroup | None
    edp_group: torch_dist.ProcessGroup | None
    sum_cluster: Summing
    sum_shard: Summing
    control: Control
    machines: list[dict[str, Any]] = field(default_factory=list)

    @property
    def cluster(self) -> int:
        return self.layout.cluster(self.rank)

    @property
    def shard(self) -> int:
        return self.layout.shard(self.rank)


def check_layout(config: TopologyConfig, world_size: int) -> ParallelLayout:
    """The layout that a configuration asks for in a world of this size; raises UserError when it does not fit."""
    layout = ParallelLayout(world_size, config.ep_size)
    if config.clusters is not None and config.clusters != layout.clusters:
        raise UserError(
            f"topology.clusters: {config.clusters}: {world_size} ranks with ep_size {config.ep_size} make "
            f"{layout.clusters} clusters; start {config.clusters * config.ep_size} ranks or drop the key"
        )
    return layout


def build_topology(config: TopologyConfig, runtime: Runtime) -> Topology:
    """Check the layout, then create all process groups once (through DeepSpeed, which owns the expert-parallel groups).

    Raises:
        UserError: the world does not fit the layout, or aggregation over MPI is asked for where there is no MPI.
    """
    layout = check_layout(config, runtime.world_size)
    # Creating groups waits for every rank, so it is named like any other collective that can hang.
    with activity.collective("new_group", "the world"):
        ep_group, edp_group = process_groups.create_groups(config.ep_size)
    cluster, shard = layout.cluster(runtime.rank), layout.shard(runtime.rank)
    # The watchdog blames a rank for a stuck collective only if it belongs to that group (`Peer.belongs`).
    activity.groups = [f"cluster {cluster}", f"shard {shard}"]
    name_group(ep_group, f"cluster {cluster}")
    name_group(edp_group, f"shard {shard}")
    # The first rank of a host describes it for all.
    told = runtime.gather(host_facts() if runtime.launch.local_rank == 0 else {"host": socket.gethostname()})
    hosts, machines = [str(facts["host"]) for facts in told], [facts for facts in told if "cpu" in facts]
    sums: tuple[Summing, Summing] = TorchSumming(ep_group, layout.ep_size), TorchSumming(edp_group, layout.clusters)
    if config.aggregation == "mpi":
        # Splits are collective over the world: every rank makes both, in this order.
        world = MpiControl(mpi_world(runtime.rank, runtime.world_size, "topology.aggregation"), "the world")
        inside = world.split(layout.cluster_ranks(cluster), f"cluster {cluster}")
        across = world.split(layout.shard_ranks(shard), f"shard {shard}")
        sums = ControlSumming(inside), ControlSumming(across)
    control = runtime.control.split(layout.cluster_ranks(cluster), f"cluster {cluster}")
    return Topology(layout, runtime.rank, hosts, ep_group, edp_group, *sums, control, machines)
