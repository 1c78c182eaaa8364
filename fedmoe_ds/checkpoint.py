"""Checkpoints: everything a run needs to continue, readable on any topology.

A checkpoint is a folder: adapters by layer and global expert id in safetensors (one file per expert shard), personal client
state, the sums of an interrupted round if there is one, the configuration, and `manifest.json` with a sha256 per file, which
catches what a disk does later. `checkpoint_writer.py` writes all of it or nothing. No pickle anywhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fedmoe_ds.errors import UserError
from fedmoe_ds.files import is_plain_name, open_plain

FORMAT = 2
MANIFEST = "manifest.json"
_FOLDER = re.compile(r"round-([0-9]{5,})(-partial)?")


@dataclass
class Snapshot:
    """What a checkpoint says about the run (the tensors are read separately, by name).

    Attributes:
        round: rounds completed.
        identity: facts that must agree between the run that wrote it and the run that reads it.
        metrics_position: bytes of metrics.jsonl that belong to the saved state.
        partial: present when a round was interrupted: done clients and their reports.
        utilisation: routed rows per (layer, expert) of the last finished round.
    """

    round: int
    identity: dict[str, Any]
    metrics_position: int
    partial: dict[str, Any] | None = None
    utilisation: list[list[int]] | None = None
    files: dict[str, str] = field(default_factory=dict)


def folder_name(round_index: int, partial: bool) -> str:
    return f"round-{round_index:05d}{'-partial' if partial else ''}"


def progress_of(folder: Path) -> tuple[int, bool] | None:
    """(rounds completed, whether one more has begun): greater the newer a checkpoint folder is. None for any other name.

    An interrupted round r+1 is saved as `round-r-partial` and is newer than `round-r`.
    """
    found = _FOLDER.fullmatch(folder.name)
    if found is None:
        return None
    progress = int(found[1]), found[2] is not None
    return progress if folder.name == folder_name(*progress) else None  # one name per round: no zeros in front of six digits


def sha256_of(path: Path) -> str:
    with open(open_plain(path, os.O_RDONLY), "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def checksum(manifest: dict[str, Any]) -> str:
    """What the manifest says about itself."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def candidates(root: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    found = [(progress, path) for path in root.glob("round-*") if (progress := progress_of(path)) is not None]
    return [path for _, path in sorted(found, reverse=True)]


def newest_intact(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose checksums hold, and one line for each damaged one that was passed over."""
    notes: list[str] = []
    for path in candidates(root):
        damage = find_damage(path)
        if damage is None:
            return path, notes
        notes.append(f"checkpoint {path.name} is damaged ({damage}); falling back to the one before")
    return None, notes


def find_damage(path: Path) -> str | None:
    """None if every file of a checkpoint is what its manifest says, else what is wrong."""
    if path.is_symlink():
        return "it is a symbolic link"
    try:
        manifest = _manifest(path)
        promised = manifest.pop("checksum")
        files = dict(manifest["files"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return f"{MANIFEST} is missing or unreadable"
    if checksum(manifest) != promised:
        return f"{MANIFEST} does not match its checksum"
    if not any(_holds_tensors(name) for name in files):
        return f"{MANIFEST} lists no tensors"
    for name, expected in files.items():
        if not is_plain_name(name):
            return f"{MANIFEST} lists {name!r}, which is no name of a file in this folder"
        try:
            if sha256_of(path / name) != expected:
                return f"{name} does not match its checksum"
        except OSError as error:
            return f"{name}: {error.strerror or error}"
    return None


def _manifest(path: Path) -> Any:
    with open(open_plain(path / MANIFEST, os.O_RDONLY), encoding="utf-8") as stream:
        return json.load(stream)


def _holds_tensors(name: str) -> bool:
    return name.endswith(".safetensors")


def read_snapshot(path: Path) -> Snapshot:
    """The manifest of an intact checkpoint."""
    manifest = _manifest(path)
    if manifest["format"] != FORMAT:
        raise UserError(
            f"checkpoint: {path}: format {manifest['format']}: this version reads format {FORMAT}; use another run name"
        )
    fields = ("round", "identity", "metrics_position", "partial", "utilisation", "files")
    return Snapshot(**{name: manifest[name] for name in fields})


class TensorReader:
    """Tensors of a checkpoint by name, from however many shard files; only from files that its manifest lists.

    Args:
        prefix: of the files' names.
        files: what the manifest lists; None: read it.
    """

    def __init__(self, path: Path, prefix: str, files: Iterable[str] | None = None) -> None:
        self._stack = contextlib.ExitStack()
        self._files: dict[str, Any] = {}
        listed = read_snapshot(path).files if files is None else files
        for name in sorted(name for name in listed if name.startswith(prefix) and _holds_tensors(name)):
            opened = self._stack.enter_context(safe_open(path / name, framework="pt"))
            self._files.update(dict.fromkeys(opened.keys(), opened))

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *details: object) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def read_into(self, name: str, place: Tensor) -> None:
        """Copy one tensor into its place. Raises UserError when the checkpoint has no such tensor or another shape."""
        if name not in self._files:
            raise UserError(
                f"checkpoint: {name}: the checkpoint has no such tensor; it belongs to another model or configuration"
            )
        value = self._files[name].get_tensor(name)
        if value.shape != place.shape:
            raise UserError(f"checkpoint: {name}: shape {tuple(value.shape)}, but this run needs {tuple(place.shape)}")
        with torch.no_grad():
            place.copy_(value)
