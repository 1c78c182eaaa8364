"""Verify: build the process groups of a world of any size in this one process, and compare them with the layout.

torch's `fake` backend makes a process believe that it is rank r of n; nothing travels. All groups go through the code of a real
start: `topology.build_topology` and `distributed.process_groups.create_groups`, hence DeepSpeed's own group creation, and
`control_plane.make_control`. So it proves who is in which group, and counts what that takes; it proves nothing of a network.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

from fedmoe_ds.config import TopologyConfig
from fedmoe_ds.distributed import gloo_control
from fedmoe_ds.distributed.control import Control
from fedmoe_ds.distributed.control_plane import make_control
from fedmoe_ds.distributed.launcher import Launch
from fedmoe_ds.distributed.open_files import control_groups, files_of
from fedmoe_ds.distributed.topology import ParallelLayout


@dataclass(frozen=True)
class Verified:
    """What was checked.

    Attributes:
        ranks: the ranks as which the whole world was built.
        groups: groups of one world that carry tensors, all of them checked.
        control: groups of the control plane of one rank, the most of those built.
        seconds: of one world.
        files: open files that rank 0 needs for the others, and the most that any other rank needs (`distributed.open_files`).
    """

    ranks: list[int]
    groups: int
    control: int
    seconds: float
    files: tuple[int, int]


class Echo:
    """A control plane in which everybody says what this rank says."""

    def __init__(self, name: str, rank: int, size: int) -> None:
        self.name, self.rank, self.size = name, rank, size

    def gather(self, payload: bytes) -> list[bytes]:
        # Enough for building groups: there all ranks say the same.
        return [payload] * self.size

    def broadcast(self, payload: bytes) -> bytes:
        return payload

    def sum(self, total: Tensor) -> Tensor:
        return total.mul_(self.size)

    def largest(self, values: Tensor) -> Tensor:
        return values

    def split(self, ranks: Sequence[int], name: str) -> Control:
        return Echo(name, ranks.index(self.rank), len(ranks))


def check_partition(layout: ParallelLayout, num_experts: int) -> None:
    """Every rank is in one cluster and one shard, and every cluster holds every expert once. Raises AssertionError."""
    clusters: dict[int, list[int]] = {}
    for rank in range(layout.world_size):
        clusters.setdefault(layout.cluster(rank), []).append(rank)
    assert len(clusters) == layout.clusters, (len(clusters), layout.clusters)
    for cluster, ranks in clusters.items():
        assert [layout.shard(rank) for rank in ranks] == list(range(layout.ep_size)), (cluster, ranks)
        held = Counter(expert for rank in ranks for expert in layout.experts(rank, num_experts))
        assert held == Counter(range(num_experts)), (cluster, held)


def sample_ranks(layout: ParallelLayout) -> list[int]:
    """First and last rank of the first, a middle and the last cluster."""
    clusters = sorted({0, layout.clusters // 2, layout.clusters - 1})
    return sorted({cluster * layout.ep_size + shard for cluster in clusters for shard in (0, layout.ep_size - 1)})


def verify(
    config: TopologyConfig,
    layout: ParallelLayout,
    num_experts: int,
    ranks: list[int] | None = None,
    device: str = "cpu",
    personal: bool = False,
) -> Verified:
    """Build the world as each of `ranks` (default: a sample) and check every group.

    Must run in a process without a process group. Raises AssertionError where a group is not what the layout says.

    Args:
        device: what the ranks compute on: `cpu` or `cuda`.
        personal: clients keep blocks, whose rows travel between the clusters.
    """
    check_partition(layout, num_experts)
    chosen = sample_ranks(layout) if ranks is None else ranks
    began = time.monotonic()
    groups, control = zip(*(_check_world(config, layout, rank) for rank in chosen), strict=True)
    # Every rank must create every group, its own or not: torch's new_group is collective.
    assert len(set(groups)) == 1, groups
    seconds = (time.monotonic() - began) / len(chosen)
    return Verified(chosen, groups[0], max(control), seconds, files_needed(layout, device != "cuda", personal))


def files_needed(layout: ParallelLayout, tensors: bool, personal: bool) -> tuple[int, int]:
    """Open files (`distributed.open_files`) of rank 0, and the most of any other rank.

    A rank that heads blocks has the most: the first of a cluster does.
    """
    size = layout.world_size
    found = [files_of(rank, size, layout.ep_size, tensors, personal=personal) for rank in range(size)]
    return found[0], max(found[1:], default=0)


def _check_world(config: TopologyConfig, layout: ParallelLayout, rank: int) -> tuple[int, int]:
    """Build the world as one rank. Returns the number of its groups that carry tensors, and of this rank's control groups."""
    from fedmoe_ds.distributed.runtime import Runtime
    from fedmoe_ds.distributed.topology import build_topology

    planned = config.model_copy(update={"ep_size": layout.ep_size, "clusters": layout.clusters, "aggregation": "torch"})
    with _fake_world(rank, layout.world_size):
        control = Echo("the world", rank, layout.world_size)
        runtime = Runtime(Launch("fake", rank, layout.world_size, rank), torch.device("cpu"), control)
        topology = build_topology(planned, runtime)
        cluster, shard = layout.cluster(rank), layout.shard(rank)
        assert (topology.cluster, topology.shard) == (cluster, shard), (topology.cluster, topology.shard)
        mates, peers = list(layout.cluster_ranks(cluster)), list(layout.shard_ranks(shard))
        assert topology.ep_group is not None and torch_dist.get_process_group_ranks(topology.ep_group) == mates, rank
        assert topology.edp_group is not None and torch_dist.get_process_group_ranks(topology.edp_group) == peers, rank
        groups = _check_all_groups(layout)
        _created.clear()
        return groups, _check_control(layout, rank)


def _check_control(layout: ParallelLayout, rank: int) -> int:
    """Build the control plane as one rank: its groups hold the rank, and no other group is made. Returns their number."""
    limit = timedelta(seconds=60)
    control = make_control("torch", "fake", rank, layout.world_size, limit)
    inside = control.split(layout.cluster_ranks(layout.cluster(rank)), "the cluster")
    assert (control.rank, control.size) == (rank, layout.world_size), (control.rank, control.size)
    assert (inside.rank, inside.size) == (layout.shard(rank), layout.ep_size), (inside.rank, inside.size)
    expected = control_groups("control of the world", rank, layout.world_size)
    expected += control_groups("control of the cluster", layout.shard(rank), layout.ep_size)
    assert all(rank in ranks for ranks in _created), (rank, _created)
    assert [len(ranks) for ranks in _created] == [group.size for group in expected], (_created, expected)
    return len(_created)


def _check_all_groups(layout: ParallelLayout) -> int:
    """The groups that were created are every cluster and every shard of the layout, each once, and nothing else."""
    found = Counter(tuple(ranks) for ranks in _created)
    expected = Counter(tuple(layout.cluster_ranks(cluster)) for cluster in range(layout.clusters))
    expected.update(tuple(layout.shard_ranks(shard)) for shard in range(layout.ep_size))
    missing, extra = expected - found, found - expected
    assert not missing, f"{missing.total()} groups were never created: {sorted(missing)[:2]}"
    assert not extra, f"{extra.total()} groups are none of the layout's: {sorted(extra)[:2]}"
    return found.total()


_created: list[list[int]] = []


@contextmanager
def _fake_world(rank: int, world_size: int) -> Iterator[None]:
    """This process as one rank of a world of `world_size`; notes every group that is created."""
    import deepspeed
    import deepspeed.comm.comm as ds_comm
    from deepspeed.utils import groups as ds_groups
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not torch_dist.is_initialized(), "a fake world needs a process without a process group"
    real, real_control = torch_dist.new_group, gloo_control.make_group

    def noting(ranks: list[int] | None = None, *rest: Any, **settings: Any) -> Any:
        _created.append(list(range(world_size)) if ranks is None else list(ranks))
        return real(ranks, *rest, **settings)

    def no_group(ranks: Sequence[int], timeout: timedelta) -> Any:
        # gloo would look for an interface, and for the others.
        _created.append(list(ranks))

    torch_dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    # Patched at the source: DeepSpeed creates its groups with the same call.
    torch_dist.new_group, gloo_control.make_group = noting, no_group
    _created.clear()
    # DeepSpeed keeps groups in module variables; the next world must not find those of this one.
    before = dict(vars(ds_groups))
    try:
        # As in join_world: DeepSpeed would compile a kernel for half a minute that nothing here calls.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("fake", auto_mpi_discovery=False, verbose=False)
        yield
    finally:
        torch_dist.new_group, gloo_control.make_group = real, real_control
        torch_dist.destroy_process_group()
        ds_comm.cdb = None
        for name, value in before.items():
            if name.strip("_").isupper():
                setattr(ds_groups, name, {} if isinstance(value, dict) else value)
