"""Host sharing: what several ranks of a host hold alike is in its memory once.

The dense part is the same on every rank, an expert shard on every rank with the same place in its cluster. Where two or more
ranks of a host hold such a part, the first of them sees to its file (`mapped_weights.py`) in the cache folder, and all of
them map it. What only one rank of a host holds is in that rank's own memory, or with `foundation.mapped: all` in such a file
too: then a later start copies nothing, and finds in the page cache what the one before has left there. Where the cache folder
cannot be written, everything is in memory of the rank's own, and the run says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from fedmoe_ds.config.foundation_section import FoundationConfig
from fedmoe_ds.errors import UserError
from fedmoe_ds.foundation.loading import Skeleton
from fedmoe_ds.foundation.mapped_weights import MappedWeights, Memory
from fedmoe_ds.storage import cache

FOLDER = "shared"
"""Below the cache folder."""

T = TypeVar("T")


def check_mapped(foundation: FoundationConfig, device: str) -> None:
    """Refuse mapped weights where a device's memory is its own. Raises UserError."""
    if foundation.mapped == "all" and device != "cpu":
        raise UserError(f"foundation.mapped: all: weights are in the memory of the {device} device; leave it at shared")


class Ranks(Protocol):
    """The world, as far as sharing needs it: see `fedmoe_ds.distributed.runtime.Runtime`."""

    @property
    def rank(self) -> int: ...

    def gather(self, value: Any) -> list[Any]: ...

    def run_on_all_ranks(self, action: Callable[[], T]) -> T: ...


@dataclass(frozen=True)
class Part:
    """Weights that `ranks` of one host hold alike; the first of them leads, and `mapped` says whether they have a file."""

    weights: MappedWeights
    ranks: list[int]
    mapped: bool

    @property
    def leader(self) -> int:
        return self.ranks[0]


def load_shared(
    skeleton: Skeleton,
    fingerprint: str,
    ep_size: int,
    hosts: list[str],
    root: Path,
    world: Ranks,
    note: Callable[[str], None],
    sums: Path | None = None,
    everything: bool = False,
) -> Memory:
    """Memory for every slot of a skeleton, filled. Every rank calls it, for CPU only.

    Args:
        skeleton: of this rank.
        fingerprint: of the foundation.
        ep_size: ranks of a cluster.
        hosts: the host of every rank.
        root: the folder of the mapped files.
        world: its ranks.
        note: takes one line if anything is mapped, or could not be.
        sums: where sums of the mapped files are remembered; None: every start reads all of them.
        everything: map what only one rank of a host holds as well.

    Raises:
        UserError: the checkpoint is damaged; the same error on every rank.
    """
    parts = _parts(skeleton, fingerprint, ep_size, hosts, root, world.rank, sums, everything)
    mine = [part for part in parts if part.mapped and part.leader == world.rank]
    # Collective, also for ranks that lead nothing: nobody maps a file before its leader has written it.
    told = world.gather(world.run_on_all_ranks(lambda: {_name(part): _written(part, skeleton) for part in mine}))
    failures: list[str] = []
    memory = world.run_on_all_ranks(lambda: _take(skeleton, parts, told, failures))
    _report(parts, [reason for found in world.gather(failures) for reason in found], root, note)
    return memory


def write_shared(skeleton: Skeleton, fingerprint: str, experts: bool, root: Path, sums: Path) -> dict[Path, int]:
    """Write the files that ranks of a host would map, without a world; their folders, with bytes.

    Args:
        skeleton: of a rank that holds all experts.
        experts: theirs as well as the dense part's, which is the same for any number of shards.

    Raises:
        UserError: the checkpoint is damaged, or the cache folder cannot be written.
    """
    parts = _parts(skeleton, fingerprint, 1, ["", ""], root, 0, sums)
    chosen = [part.weights for part in parts if experts or part.weights.slots is skeleton.dense]
    for weights in chosen:
        with cache.storing(weights.folder):
            weights.ensure(skeleton.read)
    return {weights.folder: weights.nbytes for weights in chosen}


def _parts(
    skeleton: Skeleton,
    fingerprint: str,
    ep_size: int,
    hosts: list[str],
    root: Path,
    rank: int,
    sums: Path | None,
    everything: bool = False,
) -> list[Part]:
    here = [other for other, host in enumerate(hosts) if host == hosts[rank]]
    shard = rank % ep_size
    slots = {"dense": skeleton.dense, f"experts of rank {shard} of {ep_size}": skeleton.experts}
    holders = [here, [other for other in here if other % ep_size == shard]]
    return [
        Part(MappedWeights(root, fingerprint, name, found, sums), ranks, everything or len(ranks) > 1)
        for (name, found), ranks in zip(slots.items(), holders, strict=True)
        if found
    ]


def _name(part: Part) -> str:
    return part.weights.folder.name


def _written(part: Part, skeleton: Skeleton) -> str | None:
    """Write a part's file where there is no intact one; the reason where that is impossible."""
    try:
        part.weights.ensure(skeleton.read)
    except OSError as error:
        return f"{part.weights.folder.parent}: {error.strerror or error}"
    return None


def _take(skeleton: Skeleton, parts: list[Part], told: list[dict[str, str | None]], failures: list[str]) -> Memory:
    """Map what has a file, and load the rest into memory of this rank's own."""
    memory: Memory = {}
    for part in parts:
        if not part.mapped:
            continue
        reason = told[part.leader][_name(part)]
        if reason is None:
            try:
                memory |= part.weights.map()
                continue
            except (OSError, ValueError) as error:
                reason = str(error)
        failures.append(reason)
    own = {slot.name: slot.empty(torch.device("cpu")) for slot in skeleton.slots if slot.name not in memory}
    skeleton.read(own)
    return memory | own


def _report(parts: list[Part], failures: list[str], root: Path, note: Callable[[str], None]) -> None:
    if failures:
        note(f"warning: foundation.cache: {failures[0]}; every rank keeps foundation weights in memory of its own")
        return
    mapped = [part for part in parts if part.mapped]
    if mapped:
        size = sum(part.weights.nbytes for part in mapped) / 2**20
        note(f"foundation: {size:.1f} MiB of weights are in memory once per host, mapped from {root}")
