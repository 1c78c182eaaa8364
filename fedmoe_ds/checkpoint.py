"""Checkpoints: everything a run needs to continue, readable on any topology.

A checkpoint is a folder: adapters by layer and global expert id in safetensors (one file per expert shard), personal client
state, the sums of an interrupted round if there is one, the configuration, and `manifest.json` with a sha256 per file, which
catches what a disk does later. `checkpoint_writer.py` writes all of it or nothing. No pickle anywhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fedmoe_ds.errors import UserError

FORMAT = 2
MANIFEST = "manifest.json"
PRIVATE = ("personal-", "sums-")
"""Files that hold what is a client's own, or may: the sums of an unfinished round can be those of one client. See `modes`."""
_FOLDER = re.compile(r"round-(\d{5})(-partial)?")


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


def sha256_of(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def checksum(manifest: dict[str, Any]) -> str:
    """What the manifest says about itself."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def candidates(root: Path) -> list[Path]:
    """Checkpoint folders, newest first. An interrupted round r+1 is saved as `round-r-partial` and is newer than `round-r`."""
    found = [path for path in root.glob("round-*") if _FOLDER.fullmatch(path.name)]
    return sorted(found, key=lambda path: path.name, reverse=True)


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
    """None if every file of a checkpoint is what its manifest says, else what is wrong.

    Raises:
        UserError: it is another user's, who has not let this one read all of it; nothing tells that it is damaged.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        promised = manifest.pop("checksum")
        files = dict(manifest["files"])
    except PermissionError as error:
        raise _closed(path / MANIFEST, error) from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return f"{MANIFEST} is missing or unreadable"
    if checksum(manifest) != promised:
        return f"{MANIFEST} does not match its checksum"
    for name, expected in files.items():
        try:
            if sha256_of(path / name) != expected:
                return f"{name} does not match its checksum"
        except PermissionError as error:
            raise _closed(path / name, error) from None
        except OSError as error:
            return f"{name}: {error.strerror or error}"
    return None


def _closed(path: Path, error: OSError) -> UserError:
    return UserError(
        f"output: {path}: cannot be read: {error.strerror or error}; what is a client's own only the user who wrote it can "
        "read: continue as that user, or set another name"
    )


def read_snapshot(path: Path) -> Snapshot:
    """The manifest of an intact checkpoint."""
    manifest = json.loads((path / MANIFEST).read_text())
    if manifest["format"] != FORMAT:
        raise UserError(
            f"checkpoint: {path}: format {manifest['format']}: this version reads format {FORMAT}; use another run name"
        )
    fields = ("round", "identity", "metrics_position", "partial", "utilisation", "files")
    return Snapshot(**{name: manifest[name] for name in fields})


class TensorReader:
    """Tensors of a checkpoint by name, from however many shard files."""

    def __init__(self, path: Path, prefix: str) -> None:
        self._stack = contextlib.ExitStack()
        self._files: dict[str, Any] = {}
        for file in sorted(path.glob(f"{prefix}*.safetensors")):
            opened = self._stack.enter_context(safe_open(file, framework="pt"))
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
