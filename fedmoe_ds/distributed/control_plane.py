"""Control plane: which carrier a world's messages have."""

from __future__ import annotations

from datetime import timedelta

from fedmoe_ds.distributed.control import Control
from fedmoe_ds.distributed.gloo_control import gloo_control
from fedmoe_ds.distributed.mpi_control import MpiControl, mpi_world


def make_control(kind: str, launcher: str, rank: int, world_size: int, timeout: timedelta) -> Control:
    """The control plane of a world.

    Args:
        kind: `torch`, `mpi`, or `auto`: MPI where mpirun started the ranks.
        timeout: of one collective over gloo.
    Raises:
        UserError: MPI is asked for, but MPI knows another world.
    """
    if uses_mpi(kind, launcher, world_size):
        return MpiControl(mpi_world(rank, world_size, "topology.control"), "the world")
    return gloo_control(range(world_size), "the world", timeout)


def uses_mpi(kind: str, launcher: str, world_size: int) -> bool:
    """Whether MPI carries the messages, by `topology.control` and the launcher."""
    return kind == "mpi" or (kind == "auto" and launcher == "mpirun" and world_size > 1)
