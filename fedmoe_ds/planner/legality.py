"""Legality: which (clusters, ep_size) a world allows, and the numbers where it does not."""

from __future__ import annotations

from fedmoe_ds.distributed.topology import ParallelLayout
from fedmoe_ds.planner.workload import Job
from fedmoe_ds.planner.world import World


def check_ep_size(world_size: int, ep_size: int, num_experts: int) -> ParallelLayout:
    """The layout of this world. Raises UserError where ranks or experts do not divide by ep_size."""
    layout = ParallelLayout(world_size, ep_size)
    # Rank 0 stands for all: its range exists exactly where experts divide.
    layout.experts(0, num_experts)
    return layout


def check_world(job: Job, ep_size: int, world: World) -> ParallelLayout:
    """The layout of a job in a world. Raises UserError for what a real start would refuse."""
    return check_ep_size(world.ranks, ep_size, job.expert_layout.num_experts)


def legal_sizes(world_size: int, num_experts: int) -> list[int]:
    """Every ep_size that divides both the world and the experts of a layer, ascending; 1 alone where there are no experts."""
    most = min(world_size, max(num_experts, 1))
    # Both must divide: ranks into clusters, and experts of a layer into equal shards.
    return [size for size in range(1, most + 1) if world_size % size == 0 and num_experts % size == 0]


HEADROOM = 0.9
"""Share of a rank's memory that a recommendation may take: estimates err, and allocators fragment."""


def shortage(needed: int, available: float, ep_size: int, in_flight: int | None, share: float = 1.0) -> str | None:
    """What is wrong where a rank would hold more than this share of what there is."""
    # An exact fit passes: the estimate contains the allocator's slack already.
    if needed <= share * available:
        return None
    flight = "all clients" if in_flight is None else f"{in_flight} clients"
    part = "" if share == 1.0 else f", {100 * share:.0f} % of which may be planned with"
    return (
        f"memory: {needed / 2**30:.1f} GiB per rank at ep_size {ep_size} with {flight} in flight: a rank has "
        f"{available / 2**30:.1f} GiB{part}"
    )


def host_shortage(needed: int, ranks_per_host: int, available: float | None) -> str | None:
    """The same of a host whose ranks compute on devices, and hold `needed` bytes each beside them."""
    if available is None or needed * ranks_per_host <= available:
        return None
    return (
        f"memory: {needed * ranks_per_host / 2**30:.1f} GiB on a host for {ranks_per_host} ranks (personal state, the "
        f"checkpoint's copy, moments): a host has {available / 2**30:.1f} GiB; use fewer ranks per host, a larger "
        "topology.ep_size, a smaller adapters.rank, a smaller execution.client_state_gib, or execution.moments_on=device"
    )


def tight(needed: int, available: float) -> str | None:
    """A warning where a run fits, but so narrowly that nothing would recommend it."""
    if needed <= HEADROOM * available:
        return None
    return (
        f"{100 * needed / available:.0f} % of a rank's memory is planned for; above {100 * HEADROOM:.0f} % an error of the "
        "estimate ends the run"
    )


def idle_clusters(clusters: int, participants: int) -> str | None:
    """A warning where clusters have nothing to do."""
    # A warning and no refusal: the run is correct, only slower than it could be.
    if clusters <= participants:
        return None
    return (
        f"{clusters - participants} of {clusters} clusters are idle: a round has {participants} participants; raise "
        "federation.participation, or use a larger topology.ep_size"
    )


def idle_ranks(homeless: int, ranks: int, clusters: int, participants: int) -> str | None:
    """A warning where clusters have clients, but many of their ranks none."""
    if homeless * 4 < ranks or clusters > participants:
        return None
    return (
        f"{homeless} of {ranks} ranks have no client of their own in a round of {participants} participants: they serve their "
        "experts and wait; raise federation.participation, or use fewer ranks"
    )
