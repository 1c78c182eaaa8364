"""Control: messages between the hosts' processes about the run itself, never about tensors of the model.

Reports, checkpoint manifests, agreement on a stop and personal state travel this way. One interface, two carriers with the same
results: torch.distributed (gloo) everywhere, and an MPI communicator where MPI started the ranks.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as torch_dist
from torch import Tensor

from fedmoe_ds.distributed import mpi
from fedmoe_ds.distributed.activity import activity
from fedmoe_ds.errors import UserError

if TYPE_CHECKING:
    from mpi4py import MPI

_CONNECTED = ("OMPI_COMM_WORLD_", "PMIX_", "PMI_", "MV2_COMM_WORLD_")
"""How the environment of a process begins that a launcher has connected to others for MPI."""
_PIECE = 1 << 22  # bytes of one MPI call: they stay in the processor's caches, and network messages are still large


class Control(Protocol):
    """The ranks of one communicator. All methods are collective: every rank of it calls them in the same order."""

    @property
    def name(self) -> str:
        """How messages call the communicator: `the world`, `cluster 3`."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def gather(self, payload: bytes) -> list[bytes]:
        """Every rank's bytes, in rank order, on every rank."""

    def sum(self, total: Tensor) -> Tensor:
        """Sum of a contiguous CPU tensor over the ranks, in place."""

    def largest(self, values: Tensor) -> Tensor:
        """The largest of each number over the ranks, as `sum`."""

    def split(self, color: int, name: str) -> Control:
        """One communicator for each color, ranks in the same order as here."""


class Alone:
    """A world of one."""

    name, rank, size = "the world", 0, 1

    def gather(self, payload: bytes) -> list[bytes]:
        return [payload]

    def sum(self, total: Tensor) -> Tensor:
        return total

    def largest(self, values: Tensor) -> Tensor:
        return values

    def split(self, color: int, name: str) -> Control:
        return self


class TorchControl:
    """Over a gloo group.

    Args:
        ranks: global ranks of the group, ascending.
        timeout: of one collective.
    """

    def __init__(self, group: torch_dist.ProcessGroup, ranks: list[int], name: str, timeout: timedelta) -> None:
        self.group, self.ranks, self.name, self.timeout = group, ranks, name, timeout
        self.rank, self.size = ranks.index(torch_dist.get_rank()), len(ranks)

    def gather(self, payload: bytes) -> list[bytes]:
        with activity.collective("gather", self.name, len(payload)):
            # The lengths first: all_gather takes tensors of one shape, so each payload is padded to the longest.
            sizes = torch.zeros(self.size, dtype=torch.int64)
            sizes[self.rank] = len(payload)
            torch_dist.all_reduce(sizes, group=self.group)
            mine = torch.zeros(int(sizes.max()), dtype=torch.uint8)
            # frombuffer wants writable memory, hence the copy, and refuses an empty buffer.
            mine[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else 0
            parts = [torch.empty_like(mine) for _ in range(self.size)]
            torch_dist.all_gather(parts, mine, group=self.group)
        return [bytes(part[:size].numpy()) for part, size in zip(parts, sizes.tolist(), strict=True)]

    def sum(self, total: Tensor) -> Tensor:
        with activity.collective("sum", self.name, total.nbytes):
            torch_dist.all_reduce(total, group=self.group)
        return total

    def largest(self, values: Tensor) -> Tensor:
        with activity.collective("largest", self.name, values.nbytes):
            torch_dist.all_reduce(values, torch_dist.ReduceOp.MAX, group=self.group)
        return values

    def split(self, color: int, name: str) -> Control:
        colors = [int(text) for text in self.gather(str(color).encode())]
        ranks = [rank for rank, theirs in zip(self.ranks, colors, strict=True) if theirs == color]
        if len(ranks) == 1:
            return Alone()
        # Only members take part: a rank of a large world makes its own group and no other.
        with activity.collective("new_group", name):
            group = torch_dist.new_group(ranks, timeout=self.timeout, backend="gloo", use_local_synchronization=True)
        return TorchControl(group, ranks, name, self.timeout)


class MpiControl:
    """Over an MPI communicator. Waiting ranks nap between looks: most MPI libraries would spin and take a core each."""

    def __init__(self, comm: MPI.Comm, name: str) -> None:
        self.comm, self.name = comm, name
        self.rank, self.size = comm.rank, comm.size

    def gather(self, payload: bytes) -> list[bytes]:
        with activity.collective("gather", self.name, len(payload)):
            return mpi.gather(self.comm, payload)

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

    def split(self, color: int, name: str) -> Control:
        return MpiControl(self.comm.Split(color, self.rank), name)


def make_control(kind: str, launcher: str, rank: int, world_size: int, timeout: timedelta) -> Control:
    """The control plane of a world.

    Args:
        kind: `torch`, `mpi`, or `auto`: MPI where mpirun started the ranks.
    Raises:
        UserError: MPI is asked for, but MPI knows another world.
    """
    if kind == "mpi" or (kind == "auto" and launcher == "mpirun" and world_size > 1):
        return MpiControl(mpi_world(rank, world_size, "topology.control"), "the world")
    if world_size == 1:
        return Alone()
    # Not the world's own group: that may be NCCL, which carries no tensors of the CPU.
    group = torch_dist.new_group(backend="gloo", timeout=timeout)
    return TorchControl(group, list(range(world_size)), "the world", timeout)


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
