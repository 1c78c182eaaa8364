"""Open files: how many a rank needs at once, connections included, and this process's limit on them (`ulimit -n`).

gloo connects two ranks when they first exchange something (`process_groups`), so a rank holds the connections of its rings and
trees, and those of an all-to-all: a few dozen, whatever the size of the world. Two kinds of ranks hold more: rank 0 is known to
everybody, by torch's store and by the watchdog; and where clients keep blocks, their rows go from any cluster to any other, so
a rank comes to know its like in all of them. Whether all have enough they decide together, at the store and before any group is
built, and clients' rows when the run is loaded: a rank that ended alone would leave the others waiting.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

from torch.distributed.distributed_c10d import Store

from fedmoe_ds.distributed.address import answers
from fedmoe_ds.distributed.control_plane import uses_mpi
from fedmoe_ds.distributed.gloo_control import FLAT, block_width, tree_groups
from fedmoe_ds.distributed.meeting import decide
from fedmoe_ds.errors import UserError

if TYPE_CHECKING:
    from fedmoe_ds.config import TopologyConfig
    from fedmoe_ds.distributed.launcher import Launch

OWN = 4
"""Files of a gloo group beside its connections: the socket on which it listens, and three of its event loop."""
STORE = 10
"""Files of torch's store and of the watchdog's listeners on rank 0, beside the connections with the ranks."""
WORK = 64
"""Files of a rank's own work: libraries, mapped weights and data, records, a checkpoint under way."""
_PLENTY = 1 << 16
"""Enough for anything that is not counted here, and not so much that programs that look at every possible file take long."""
_FIX = "raise the hard limit of every host (ulimit -Hn, LimitNOFILE, limits.conf)"
_ANSWER_S = 120.0
"""How long a rank that takes rank 0 for refused looks for it all the same; srun ends what is left of a step after 300 s."""


@dataclass(frozen=True)
class GlooGroup:
    """What a rank holds of one gloo group.

    Attributes:
        name: what it is for.
        size: its ranks.
        peers: those that this rank exchanges something with.
    """

    name: str
    size: int
    peers: int

    @property
    def files(self) -> int:
        return OWN + self.peers


def ring_peers(rank: int, size: int) -> set[int]:
    """Neighbours in gloo's sums and gathers."""
    return {(rank - 1) % size, (rank + 1) % size} - {rank}


def tree_peers(rank: int, size: int) -> set[int]:
    """Neighbours in gloo's broadcasts from the first rank: after i steps the first 2^i ranks know, and each tells one more."""
    steps = range((size - 1).bit_length())
    return {rank ^ (1 << i) for i in steps if rank < 2 << i and rank ^ (1 << i) < size}


def control_groups(name: str, rank: int, size: int) -> list[GlooGroup]:
    """Of one control communicator (`gloo_control`): one group of few ranks, or a block and, at its head, the heads."""
    if size <= FLAT:
        parts = {name: range(size)}
    else:
        block, heads = tree_groups(rank, size, block_width(size))
        parts = {f"{name}, block": block, f"{name}, heads": heads}
    found = []
    for part, ranks in parts.items():
        if len(ranks) > 1:
            place = ranks.index(rank), len(ranks)
            found.append(GlooGroup(part, len(ranks), len(ring_peers(*place) | tree_peers(*place))))
    return found


def gloo_groups(
    rank: int, world_size: int, ep_size: int, tensors: bool, control: bool, personal: bool = False
) -> list[GlooGroup]:
    """All gloo groups of a rank.

    Args:
        tensors: they carry tensors of the model, too (on the CPU; GPUs have NCCL for it).
        control: they carry the control plane (else MPI does).
        personal: clients keep blocks, whose rows travel between the clusters (`checkpoint.client_homes`).
    """
    if world_size == 1:
        return []
    groups = []
    if tensors:
        clusters = world_size // ep_size
        # torch's own group of the world is never used, so it has no connections.
        groups.append(GlooGroup("the world's own", world_size, 0))
        groups.append(GlooGroup("tokens within the cluster", ep_size, ep_size - 1))
        others = clusters - 1 if personal else len(ring_peers(rank // ep_size, clusters))
        groups.append(GlooGroup("sums and rows between the clusters", clusters, others))
    if control:
        groups += control_groups("control of the world", rank, world_size)
        groups += control_groups("control of the cluster", rank % ep_size, ep_size)
    return groups


def rank0_files(rank: int, world_size: int) -> int:
    """Files of torch's store and of the watchdog: rank 0 has one connection of each with every rank."""
    if world_size == 1:
        return 0
    return 2 * world_size + STORE if rank == 0 else 3


def files_of(
    rank: int, world_size: int, ep_size: int, tensors: bool = True, control: bool = True, personal: bool = False
) -> int:
    """Open files that a rank needs at most for the others, see `gloo_groups`."""
    groups = gloo_groups(rank, world_size, ep_size, tensors, control, personal)
    return rank0_files(rank, world_size) + sum(group.files for group in groups)


def needed(launch: Launch, topology: TopologyConfig, device: str) -> int:
    """Open files that this rank needs: those it has now, those for the others, and those of its work."""
    # A layout that does not fit is refused later, in words of its own.
    ep_size = min(topology.ep_size, launch.world_size)
    control = not uses_mpi(topology.control, launch.launcher, launch.world_size)
    return open_now() + WORK + files_of(launch.rank, launch.world_size, ep_size, device != "cuda", control)


def needed_for_rows(launch: Launch, ep_size: int, device: str) -> int:
    """Open files that this rank needs in all where clients keep blocks, which only a loaded run knows: the store's connections
    and those of the control plane are open then, the others may not be."""
    groups = gloo_groups(launch.rank, launch.world_size, ep_size, device != "cuda", control=False, personal=True)
    return open_now() + WORK + sum(group.files for group in groups)


def open_now() -> int:
    """Open files of this process; 0 where the system does not say."""
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return 0


@dataclass(frozen=True)
class Allowance:
    """Open files of one rank.

    Attributes:
        host: where it runs.
        needed: how many it needs at once.
        allowed: how many it may have.
    """

    host: str
    needed: int
    allowed: int


def allow(needed: int) -> Allowance:
    """Raise this process's limit on open files to plenty, or to what is needed, as far as the hard limit lets it."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (sys.maxsize if limit == resource.RLIM_INFINITY else limit for limit in limits)
    wanted = min(max(needed, _PLENTY), hard)
    if soft < wanted:
        # A system may have a limit of its own below the hard one.
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, limits[1]))
            soft = wanted
    return Allowance(socket.gethostname(), needed, soft)


def check_meeting(mine: Allowance, rank: int, world_size: int) -> None:
    """Refuse a world whose ranks cannot even meet: rank 0 has too few files for the store, so nobody can be told.

    Every rank finds that out by itself, by its own limit: hosts of a cluster have the same one. Where rank 0's host has more
    than this one, its store answers at `MASTER_ADDR` and `MASTER_PORT`.

    Raises:
        UserError: the same one on every rank.
    """
    met = WORK + STORE + world_size
    if world_size > 1 and mine.allowed < met and (rank == 0 or not _is_there(time.monotonic() + _ANSWER_S)):
        raise UserError(
            f"open files: {mine.allowed}: rank 0 needs {met} for {world_size} ranks to meet, and twice as many later; {_FIX}"
        )


def _is_there(until: float) -> bool:
    """Whether somebody listens where ranks meet, or begins to within this time."""
    while not answers(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])):
        if time.monotonic() >= until:
            return False
        time.sleep(0.5)
    return True


def check_together(store: Store, rank: int, world_size: int, mine: Allowance) -> None:
    """Compare what all ranks need with what they may have. Every rank calls it, and all of them get the same answer.

    Args:
        store: that all ranks have met at.
    Raises:
        UserError: a rank may have too few open files.
    """
    decide(store, rank, world_size, astuple(mine), refuse)


def refuse(told: Sequence[Sequence[Any]]) -> None:
    """Raise UserError for the first rank that lacks files, of the allowances of all ranks as tuples."""
    lacking = [rank for rank, (_, needed, allowed) in enumerate(told) if allowed < needed]
    if lacking:
        host, needed, allowed = told[lacking[0]]
        others = f", {len(lacking)} of which have too few" if len(lacking) > 1 else ""
        raise UserError(
            f"open files: {allowed}: rank {lacking[0]} on {host} needs {needed} in a world of {len(told)} ranks{others}; {_FIX}"
        )
