"""Agreement: the ranks of a job have read one configuration, run one version of everything, and found the same contents.

Every rank reads files of its own host. A key that one host has otherwise, or a host that was not brought up to date, would
train to the end, with a result that belongs to no configuration. Another job's rank at the wrong port is found, too.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedmoe_ds.config import Config
from fedmoe_ds.distributed.runtime import Runtime
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation.identity import Identity, differences
from fedmoe_ds.storage.strict_json import tree_sha256

OWN = {"execution": ("threads",), "topology": ("interface",)}
"""Keys that a host may have for itself: they name what it has, and change no bit."""
PACKAGES = ("fedmoe-ds", "torch", "deepspeed", "transformers", "numpy")
_SOURCES = "source of fedmoe-ds"


def check_same_start(config: Config, runtime: Runtime) -> None:
    """Refuse a job whose ranks were not started alike. Every rank calls it, before anything is loaded.

    Raises:
        UserError: naming the first key or package that a rank has otherwise than rank 0; the same on all ranks.
    """
    tree = shared_keys(config)
    # Ranks of one host have one installation.
    software = _software() if runtime.launch.local_rank == 0 else None
    told = runtime.gather([socket.gethostname(), tree_sha256(tree), software])
    hosts = [host for host, _, _ in told]
    way = "give every host the same file and keys"
    _refuse_first(_other([keys for _, keys, _ in told]), tree, runtime, hosts, "was started with", way)
    known = [theirs if theirs is not None else told[0][2] for _, _, theirs in told]
    for rank, theirs in enumerate(known):
        for name, mine, first in differences(theirs, known[0]):
            raise UserError(_words(name, mine, first, rank, hosts, "runs", "install the same on every host"))


def check_same_contents(identity: Identity, runtime: Runtime, hosts: Sequence[str]) -> None:
    """Refuse a job whose ranks have found other contents in what each reads by itself: a trace, adapters to begin with.

    Args:
        identity: of this rank's start.
        hosts: of every rank.

    Raises:
        UserError: the same on all ranks.
    """
    other = _other(runtime.gather(tree_sha256(identity)))
    _refuse_first(other, identity, runtime, hosts, "finds", "give every host the same files")


def shared_keys(config: Config) -> dict[str, Any]:
    """The configuration without the keys that a host may have for itself."""
    tree = config.model_dump(mode="json")
    return {name: _without(value, OWN.get(name, ())) for name, value in tree.items()}


def _without(section: Any, names: Sequence[str]) -> Any:
    return {key: value for key, value in section.items() if key not in names} if names else section


def _software() -> dict[str, str]:
    return {_SOURCES: _sources_sha256(), **{name: version(name) for name in PACKAGES}}


def _sources_sha256() -> str:
    """Of everything that is run or compiled: a version alone does not tell two checkouts apart."""
    folder, digest = Path(__file__).parents[1], hashlib.sha256()
    kinds = (".py", ".cpp", ".h", ".yaml")
    # An editor's lock is a link to nothing, and no source.
    for file in sorted(path for path in folder.rglob("*") if path.suffix in kinds and path.is_file()):
        digest.update(f"{file.relative_to(folder)}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:12]


def _other(digests: Sequence[str]) -> int | None:
    """The first rank that has not what rank 0 has."""
    return next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)


def _refuse_first(other: int | None, tree: dict[str, Any], runtime: Runtime, hosts: Sequence[str], does: str, way: str) -> None:
    if other is None:
        return
    # Only now, and all ranks come here: the trees of thousands of ranks are no small message.
    trees = runtime.gather(tree if runtime.rank in (0, other) else None)
    name, theirs, first = next(differences(trees[other], trees[0]))
    raise UserError(_words(name, theirs, first, other, hosts, does, way))


def _words(name: str, theirs: Any, first: Any, rank: int, hosts: Sequence[str], does: str, way: str) -> str:
    return f"{name}: {theirs}: rank {rank} on {hosts[rank]} {does} this, rank 0 on {hosts[0]} {does} {first}; {way}"
