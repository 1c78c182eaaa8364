"""MPI control: the control plane over an MPI communicator, where MPI started the ranks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from fedmoe_ds.distributed import mpi
from fedmoe_ds.distributed.activity import activity
from fedmoe_ds.errors import UserError

if TYPE_CHECKING:
    from mpi4py import MPI

    from fedmoe_ds.distributed.control import Control

_CONNECTED = ("OMPI_COMM_WORLD_", "PMIX_", "PMI_", "MV2_COMM_WORLD_")
"""How the environment of a process begins that a launcher has connected to others for MPI."""
_PIECE = 1 << 22  # bytes of one MPI call: they stay in the processor's caches, and network messages are still large


class MpiControl:
    """Over an MPI communicator. Waiting ranks nap between looks: most MPI libraries would spin and take a core each."""

    def __init__(self, comm: MPI.Comm, name: str) -> None:
        self.comm, self.name = comm, name
        self.rank, self.size = comm.rank, comm.size

    def gather(self, payload: bytes) -> list[bytes]:
        with activity.collective("gather", self.name, len(payload)):
            return mpi.gather(self.comm, payload)

    def broadcast(self, payload: bytes) -> bytes:
        with activity.collective("broadcast", self.name, len(payload) if self.rank == 0 else 0):
            return mpi.broadcast(self.comm, payload)

    def sum(self, total: Tensor) -> Tensor:
        from mpi4py import MPI

        return self._reduce("sum", total, MPI.SUM)

    def largest(self, values: Tensor) -> Tensor:
        from mpi4py import MPI

        return self._reduce("largest", values, MPI.MAX)

    def _reduce(self, name: str, tensor: Tensor, operation: MPI.Op) -> Tensor:
        from mpi4py import MPI

        assert tensor.is_contiguous() and tensor.device.type == "cpu"
        flat = tensor.view(-1).numpy()
        with activity.collective(name, self.name, tensor.nbytes):
            # The wait for the last rank may be long, so it naps; the sum itself is short, and naps would hold it up.
            mpi.wait(self.comm.Ibarrier())
            piece = _PIECE // tensor.element_size()
            for start in range(0, len(flat), piece):
                self.comm.Allreduce(MPI.IN_PLACE, flat[start : start + piece], operation)
        return tensor

    def split(self, ranks: Sequence[int], name: str) -> Control:
        # Parts are a partition, so the first rank of a part is a color of its own.
        return MpiControl(self.comm.Split(ranks[0], self.rank), name)


def mpi_world(rank: int, world_size: int, key: str) -> MPI.Comm:
    """MPI's communicator of all ranks, in this world's order. Raises UserError as `check_mpi` does."""
    check_mpi(world_size, key)
    from mpi4py import MPI

    return MPI.COMM_WORLD.Split(0, rank)


def check_mpi(world_size: int, key: str) -> None:
    """Whether MPI knows this world. Every rank can tell by itself, before there is one.

    Raises:
        UserError: nobody connected the ranks for MPI, or MPI has another world; the message names `key`.
    """
    way = f"start the ranks with mpirun (or srun --mpi=pmix), or use {key}=torch"
    if world_size > 1 and not any(name.startswith(_CONNECTED) for name in os.environ):
        # Checked before MPI is initialised: some libraries end the process when srun has not prepared them.
        raise UserError(f"{key}: mpi: the {world_size} ranks were started without MPI: each would be alone; {way}")
    from mpi4py import MPI

    if MPI.COMM_WORLD.size != world_size:
        raise UserError(f"{key}: mpi: MPI sees {MPI.COMM_WORLD.size} ranks in a world of {world_size}; {way}")
