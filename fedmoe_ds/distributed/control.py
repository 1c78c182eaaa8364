"""Control: messages between the hosts' processes about the run itself, never about tensors of the model.

Reports, checkpoint manifests, agreement on a stop and personal state travel this way. One interface, two carriers with the same
results: gloo everywhere (`gloo_control`), and an MPI communicator where MPI started the ranks (`mpi_control`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


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

    def broadcast(self, payload: bytes) -> bytes:
        """Rank 0's bytes, on every rank; those of the others are not looked at. Rank 0 does not wait for the others."""

    def sum(self, total: Tensor) -> Tensor:
        """Sum of a contiguous CPU tensor over the ranks, in place. The order of the additions is the carrier's own: exact for
        integers, and for floats of which one at most is not zero."""

    def largest(self, values: Tensor) -> Tensor:
        """The largest of each number over the ranks, as `sum`."""

    def split(self, ranks: Sequence[int], name: str) -> Control:
        """The communicator of some of these ranks, this one among them, in ascending order.

        Every rank calls it at the same time with the ranks of its own part, and the parts are a partition.
        """


class Alone:
    """A world of one."""

    name, rank, size = "the world", 0, 1

    def gather(self, payload: bytes) -> list[bytes]:
        return [payload]

    def broadcast(self, payload: bytes) -> bytes:
        return payload

    def sum(self, total: Tensor) -> Tensor:
        return total

    def largest(self, values: Tensor) -> Tensor:
        return values

    def split(self, ranks: Sequence[int], name: str) -> Control:
        return self
