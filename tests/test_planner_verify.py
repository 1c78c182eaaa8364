"""The topology dry run: process groups of worlds that this machine does not have, through the code of a real start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as torch_dist

from fedmoe_ds.bench.scale.curves import control
from fedmoe_ds.config import TopologyConfig
from fedmoe_ds.distributed import gloo_control, process_groups
from fedmoe_ds.distributed.topology import ParallelLayout
from fedmoe_ds.planner.verify import Echo, sample_ranks, verify

REPOSITORY = Path(__file__).parents[1]


@pytest.mark.parametrize(("world", "ep_size"), [(2, 1), (2, 2), (12, 3), (64, 8)])
def test_every_rank_of_a_small_world(world: int, ep_size: int) -> None:
    layout = ParallelLayout(world, ep_size)
    ranks = list(range(world)) if world < 20 else None
    found = verify(TopologyConfig(), layout, 24, ranks)
    assert found.ranks == (ranks or sample_ranks(layout))
    assert found.groups >= layout.clusters
    assert not torch_dist.is_initialized()


def test_4096_ranks() -> None:
    found = verify(TopologyConfig(), ParallelLayout(4096, 64), 64, [0, 4095])
    assert found.groups >= 64
    kept = verify(TopologyConfig(), ParallelLayout(4096, 8), 64, [0], personal=True)
    assert kept.files[0] > 2 * 4096 + 511 and 511 < kept.files[1] < 600, "rows of clients go from any cluster to any other"
    assert control.measure(4096)["files_personal"] == kept.files[1], "of the rank that needs most, as without rows"
    # A head's block and the heads, and its cluster's; rank 0 is known to everybody, the others to a few dozen.
    assert found.control == 4 and 2 * 4096 < found.files[0] < 2 * 4096 + 256 and found.files[1] < 192


def test_a_wrong_group_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = process_groups.create_groups
    monkeypatch.setattr(process_groups, "create_groups", lambda ep_size: real(ep_size)[::-1])
    with pytest.raises(AssertionError):
        verify(TopologyConfig(), ParallelLayout(8, 2), 8, [3])
    assert not torch_dist.is_initialized()


@pytest.mark.parametrize("extra", [[0, 1], [1, 2]])
def test_a_group_too_many_is_found(monkeypatch: pytest.MonkeyPatch, extra: list[int]) -> None:
    """One that exists already, and one that overlaps two clusters."""
    real = process_groups.create_groups

    def create(ep_size: int) -> tuple[Any, Any]:
        torch_dist.new_group(extra)
        return real(ep_size)

    monkeypatch.setattr(process_groups, "create_groups", create)
    with pytest.raises(AssertionError, match="1 groups are none of the layout's"):
        verify(TopologyConfig(), ParallelLayout(8, 2), 8, [3])


def test_echo_is_a_control_plane() -> None:
    world = Echo("the world", 5, 8)
    cluster = world.split([4, 5], "cluster 2")
    assert (cluster.rank, cluster.size) == (1, 2) and world.gather(b"x") == [b"x"] * 8 and world.broadcast(b"x") == b"x"


def test_a_wrong_control_group_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that leaves its block's group out, and a rank that makes a group of strangers."""
    real = gloo_control.tree_groups
    monkeypatch.setattr(
        gloo_control, "tree_groups", lambda rank, size, width: (range(rank, rank + 1), real(rank, size, width)[1])
    )
    with pytest.raises(AssertionError):
        verify(TopologyConfig(), ParallelLayout(40, 2), 8, [7])
    assert not torch_dist.is_initialized()
