"""Legality: which (clusters, ep_size) a world allows, and the numbers where it does not."""

from __future__ import annotations

from fedmoe_ds.distributed.topology import ParallelLayout
from fedmoe_ds.errors import UserError
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


def check_fits(needed: int, available: float, ep_size: int, in_flight: int | None) -> None:
    """Raise UserError where a rank would hold more than there is."""
    # An exact fit passes: the estimate contains the allocator's slack already.
    if needed > available:
        flight = "all clients" if in_flight is None else f"{in_flight} clients"
        raise UserError(
            f"memory: {needed / 2**30:.1f} GiB per rank at ep_size {ep_size} with {flight} in flight: a rank has "
            f"{available / 2**30:.1f} GiB; use a larger topology.ep_size, fewer execution.clients_in_flight, or "
            "execution.activation_checkpointing=true"
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
