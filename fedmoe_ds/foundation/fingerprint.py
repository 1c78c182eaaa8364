"""Fingerprint: what tells one foundation from another, made by all ranks that see the same files together.

It is a hash over the configuration and the SHA-256 of each weight file, so it needs every byte of the model. The ranks of a
host share out the files, and tell each other what they found, so a host reads each byte once at most; on a network file system
the ranks of all hosts do, so the job does. Sums of large files are remembered (`file_sums.py`). Every host makes a fingerprint
of what it sees itself, and they are compared.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fedmoe_ds.distributed.stop_points import file_sha256
from fedmoe_ds.errors import UserError
from fedmoe_ds.foundation import file_sums
from fedmoe_ds.foundation.meta_model import CONFIG_FILE
from fedmoe_ds.foundation.weight_files import WeightFiles
from fedmoe_ds.storage.strict_json import read_json

T = TypeVar("T")
Known = Mapping[tuple[Any, ...], str]
"""SHA-256 by name and stamp of a weight file."""


class Ranks(Protocol):
    """The world, as far as a fingerprint needs it: see `fedmoe_ds.distributed.runtime.Runtime`."""

    @property
    def rank(self) -> int: ...

    def gather(self, value: Any) -> list[Any]: ...

    def run_on_all_ranks(self, action: Callable[[], T]) -> T: ...


def fingerprint(folder: Path, known: Known | None = None) -> str:
    """SHA-256 over the model's config and the name, size and SHA-256 of each of its weight files; no `known` one is read."""
    digest = hashlib.sha256()
    config = read_json(folder / CONFIG_FILE, constants=True)
    # The values count, not how the file is laid out.
    digest.update(json.dumps(config, sort_keys=True).encode())
    for file in WeightFiles(folder).paths:
        found = known.get(_key(file)) if known else None
        digest.update(f"\n{file.name} {file.stat().st_size} {found or _blob(file) or file_sha256(file)}".encode())
    return digest.hexdigest()


def fingerprint_of(folder: Path, sums: Mapping[Path, str]) -> str:
    """The same, with the SHA-256 of weight files that are known by their paths."""
    return fingerprint(folder, {_key(file): found for file, found in sums.items()})


def remembered_fingerprint(folder: Path, place: Path) -> str:
    """The same for one process alone, with the sums that are remembered in `place`."""
    return fingerprint_of(folder, file_sums.file_sums(unnamed_files(folder), place, 1))


def shared_fingerprint(folder: Path, place: Path, hosts: list[str], world: Ranks) -> str:
    """The same on every rank, without reading a byte twice on any host, or in the job where hosts share the files. Every rank
    calls it.

    Args:
        folder: of the model, on this rank's host.
        place: where sums are remembered.
        hosts: the host of every rank.
        world: its ranks.

    Raises:
        UserError: hosts have different models; the same error on every rank.
    """
    readers = _readers(folder, hosts, world)

    def mine() -> list[tuple[list[Any], str]]:
        """Sums of this rank's share, with what they are known by."""
        files = unnamed_files(folder)
        share = _shares([file.stat().st_size for file in files], len(readers))[readers.index(world.rank)]
        return [(list(_key(files[index])), file_sums.file_sum(files[index], place)) for index in share]

    told = world.gather(world.run_on_all_ranks(mine))
    # By stamp, not by name alone: should one of them see other files all the same (containers), it reads its own.
    known = {tuple(key): found for rank in readers for key, found in told[rank]}
    prints = world.gather(world.run_on_all_ranks(lambda: fingerprint(folder, known)))
    for rank, theirs in enumerate(prints):
        if theirs != prints[0]:
            raise UserError(
                f"foundation: {folder}: rank {rank} on {hosts[rank]} finds another model there (fingerprint {theirs[:12]}) "
                f"than rank 0 on {hosts[0]} ({prints[0][:12]}); give every host the same files"
            )
    return str(prints[0])


def unnamed_files(folder: Path) -> list[Path]:
    """Weight files whose sum their name does not tell, in name order: all but those of the hub's cache."""
    return [file for file in WeightFiles(folder).paths if _blob(file) is None]


def _readers(folder: Path, hosts: list[str], world: Ranks) -> list[int]:
    """The ranks that this one shares out the files with: of its host, and of all hosts that see the same on a network."""
    host = hosts[world.rank]
    first = {name: rank for rank, name in reversed(list(enumerate(hosts)))}
    looks = first[host] == world.rank  # one look per host: it reads some pages of every file
    views = world.gather(world.run_on_all_ranks(lambda: file_sums.network_view(unnamed_files(folder)) if looks else None))
    mine = views[first[host]]
    same = {name for name, rank in first.items() if name == host or (mine is not None and views[rank] == mine)}
    return [rank for rank, name in enumerate(hosts) if name in same]


def _shares(sizes: list[int], ranks: int) -> list[list[int]]:
    """Files by rank, even in bytes: the largest first, each to the rank that has least."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    totals = [0] * ranks
    for index in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
        least = totals.index(min(totals))
        shares[least].append(index)
        totals[least] += sizes[index]
    return shares


def _key(file: Path) -> tuple[Any, ...]:
    return (file.name, *file_sums.stamp(file))


def _blob(file: Path) -> str | None:
    """The hub cache stores large files under their own SHA-256, checked at download: no need to read them again."""
    blob = file.resolve()
    return blob.name if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name) else None
