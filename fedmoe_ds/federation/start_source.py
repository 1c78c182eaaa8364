"""Start source: adapters that exist already, by canonical key: those of a run's checkpoint, or of a folder that PEFT reads.

Nothing but names is read here until a tensor is asked for, so every rank reads what it holds and a plan reads no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from fedmoe_ds.adapter_formats import read_adapter
from fedmoe_ds.checkpoint.personal_reader import PersonalReader
from fedmoe_ds.checkpoint.reader import MANIFEST, PRIVATE, Snapshot, TensorReader, find_damage, newest_intact, read_snapshot
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation.identity import START
from fedmoe_ds.storage.files import expanded

T = TypeVar("T")
PEFT_CONFIG = "adapter_config.json"
_CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Source:
    """Adapters that a federation may begin with.

    Attributes:
        title: what messages call them.
        facts: the same for the record.
        rank, scale: rows of a LoRA pair, at most, and what its product counts: alpha / rank.
        keys: of the tensors that all clients share; `read` reads one, float32.
        merged: keys of frozen weights that products have moved into (FLoRA), `<key of the pair>.base`; `read_merged` reads one.
        foundation, dtype: fingerprint and storage type of the model they were trained on; None where nothing tells.
        moe: the section of adapter experts (`adapters.moe`), without keys at their defaults; empty where there is none.
        expand: the section of further layers (`foundation.expand`), whose number says where they are; None: none are known.
        left: blocks that each client keeps for itself, which nobody else can start from.
        closed: these could not be looked at: they are another user's, or damaged.
    """

    title: str
    facts: dict[str, Any]
    rank: int
    scale: float
    keys: frozenset[str]
    read: Callable[[str], Tensor]
    merged: frozenset[str] = frozenset()
    read_merged: Callable[[str], Tensor] = field(default=lambda key: _nothing(key))
    foundation: str | None = None
    dtype: str | None = None
    moe: Mapping[str, Any] = field(default_factory=dict)
    expand: Any = None
    left: tuple[str, ...] = ()
    closed: bool = False


def _nothing(key: str) -> Tensor:
    raise KeyError(key)


def block_of(key: str) -> str:
    """The name of the block that a canonical key belongs to: the key without layer and expert."""
    parts = key.split(".")
    # `layers.<n>.experts.<e>.<tail>`, `layers.<n>.<name>`, `model.<name>`.
    name = parts[2:] if parts[0] == "layers" else parts[1:]
    return ".".join(name[:1] + name[2:] if name[:1] == ["experts"] and name[1].isdigit() else name)


def find_start(given: str, whole: bool = True) -> Path:
    """The folder to read: a checkpoint (of a run the newest intact one), or an adapter of PEFT's.

    Args:
        whole: look at the checksums of a checkpoint that is named.
    Raises:
        UserError: there is none of these, it is damaged, or another user's who lets nobody read it.
    """
    folder = expanded(given, START)
    try:
        return _found(given, folder, whole)
    except OSError as error:
        raise UserError(
            f"{START}: {given}: cannot be read: {error.strerror or error}; ask its owner for an export (--format peft)"
        ) from None


def _found(given: str, folder: Path, whole: bool) -> Path:
    if not folder.is_dir():
        raise UserError(f"{START}: {given}: no such folder; give a run, a checkpoint of one, or a folder with {PEFT_CONFIG}")
    if (folder / PEFT_CONFIG).is_file():
        return folder
    if (folder / MANIFEST).is_file():
        if whole and (damage := _open(given, lambda: find_damage(folder, PRIVATE))) is not None:
            raise UserError(f"{START}: {given}: the checkpoint is damaged: {damage}; give another one of that run")
        return folder
    if not (folder / _CHECKPOINTS).is_dir():
        kind = "a model, which foundation.path takes" if (folder / "config.json").is_file() else "none of these"
        raise UserError(f"{START}: {given}: expected a run, a checkpoint or a folder with {PEFT_CONFIG}, and it is {kind}")
    found, notes = _open(given, lambda: newest_intact(folder / _CHECKPOINTS, PRIVATE))
    if found is None:
        why = notes[0] if notes else "it has none yet"
        raise UserError(f"{START}: {given}: this run holds no intact checkpoint ({why}); give another run")
    return found


def _open(given: str, look: Callable[[], T]) -> T:
    """Look at a run without what is its clients' own: nobody starts from that, and only the run's own user can read it."""
    try:
        return look()
    except UserError as error:  # of this run it would advise another name
        why = str(error).partition("; ")[0].removeprefix("output: ")
        raise UserError(f"{START}: {given}: {why}; ask its owner for an export (--format peft)") from None


def open_source(folder: Path) -> Source:
    """Open what `find_start` has found, on every rank.

    Raises:
        UserError: it cannot be read, or is not what it seems to be.
    """
    try:
        return _adapter(folder) if (folder / PEFT_CONFIG).is_file() else _checkpoint(folder)
    except OSError as error:
        raise UserError(
            f"{START}: {folder}: cannot be read: {error.strerror or error}; put it on a file system that all ranks share"
        ) from None


def _checkpoint(folder: Path) -> Source:
    snapshot = read_snapshot(folder)
    adapters, method = _settings(snapshot, folder, "adapters"), _settings(snapshot, folder, "method")
    run = folder.parent.parent.name if folder.parent.name == _CHECKPOINTS else folder.name
    facts = {"kind": "run", "name": run, "method": method.get("name"), "round": snapshot.round}
    shared = TensorReader(folder, "adapters", snapshot.files)
    merged = TensorReader(folder, "server.base-", snapshot.files)
    own = _own_blocks(folder, snapshot)
    try:
        rank, alpha = int(adapters["rank"]), float(adapters["alpha"])
        scale = alpha / rank
    except (LookupError, TypeError, ValueError, ZeroDivisionError):
        raise UserError(f"{START}: {folder}: its {MANIFEST} does not tell rank and alpha; give another checkpoint") from None
    return Source(
        title=f"run {run} ({facts['method']}, round {snapshot.round})",
        facts=facts,
        rank=rank,
        scale=scale,
        keys=frozenset(shared),
        read=shared.read,
        merged=frozenset(merged),
        read_merged=merged.read,
        foundation=snapshot.identity.get("foundation"),
        dtype=snapshot.identity.get("foundation.dtype"),
        moe=moe if isinstance(moe := adapters.get("moe"), dict) else {},
        expand=snapshot.identity.get("foundation.expand"),
        # Control and dual variables are a means of training, and no part of a model.
        left=tuple(name for name in own or () if ".control" not in name),
        closed=own is None,
    )


def _own_blocks(folder: Path, snapshot: Snapshot) -> Collection[str] | None:
    """What each client keeps for itself; None where that cannot be read, which no start needs."""
    try:
        with PersonalReader(folder, snapshot.files) as reader:
            return sorted({block_of(key) for key in reader})
    except (OSError, UserError):
        return None


def _settings(snapshot: Snapshot, folder: Path, section: str) -> Mapping[str, Any]:
    found = snapshot.identity.get(section)
    if not isinstance(found, dict):
        raise UserError(f"{START}: {folder}: its {MANIFEST} does not tell {section}; give another checkpoint")
    return found


def _adapter(folder: Path) -> Source:
    adapter = read_adapter(folder, START)
    facts = {"kind": adapter.format, "name": folder.name, "base_model": adapter.base_model}
    title = f"adapter {folder.name} ({adapter.format}, rank {adapter.rank})"
    return Source(title, facts, adapter.rank, adapter.scale, frozenset(adapter.shapes), adapter.read)
