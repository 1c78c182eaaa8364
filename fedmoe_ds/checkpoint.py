"""Checkpoints: everything a run needs to continue, written atomically, readable on any topology.

A checkpoint is a folder: adapters by layer and global expert id in safetensors (one file per expert shard), personal client
state, the sums of an interrupted round if there is one, the configuration, and `manifest.json` with a sha256 per file. It is
written beside its final place and renamed when every byte is on disk, so a reader never sees half a checkpoint; checksums catch
what the disk does afterwards. No pickle anywhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedmoe_ds.errors import UserError
from fedmoe_ds.runtime import Runtime

FORMAT = 2
MANIFEST = "manifest.json"
_UNFINISHED = ".writing-"
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


def save(
    root: Path,
    runtime: Runtime,
    snapshot: Snapshot,
    tensors: dict[str, dict[str, Tensor]],
    texts: dict[str, str],
    keep: int,
) -> Path:
    """Write one checkpoint together with all ranks.

    Args:
        root: the run's checkpoint folder, on a file system that all ranks share.
        tensors: files this rank writes: file name -> tensors by name (empty on most ranks).
        texts: small text files, written by rank 0.
        keep: newest checkpoints to keep; older ones are removed afterwards.
    Raises:
        UserError: the disk is full or not writable; what was there before is untouched.
    """
    target = root / folder_name(snapshot.round, snapshot.partial is not None)
    working = root / f"{_UNFINISHED}{target.name}"
    try:
        runtime.on_main(lambda: _guard(root, lambda: _fresh_folder(working)))
        mine = runtime.together(lambda: _guard(root, lambda: _write_tensors(working, tensors)))
        sums = {name: value for part in runtime.gather(mine) for name, value in part.items()}
        runtime.on_main(lambda: _guard(root, lambda: _publish(working, target, snapshot, sums, texts)))
    except UserError:  # the same one on all ranks, so nobody is writing any more
        if runtime.is_main:
            remove_unfinished(root)
        raise
    runtime.on_main(lambda: _prune(root, keep, target))
    return target


def _guard(root: Path, action: Any) -> Any:
    try:
        return action()
    except OSError as error:
        raise UserError(
            f"checkpoint: {root}: cannot write: {error.strerror or error}; the checkpoints already there are intact: "
            "make room, then start again with --resume auto"
        ) from None


def _fresh_folder(working: Path) -> None:
    shutil.rmtree(working, ignore_errors=True)
    working.mkdir(parents=True)


def _write_tensors(working: Path, tensors: dict[str, dict[str, Tensor]]) -> dict[str, str]:
    sums = {}
    for name, content in tensors.items():
        path = working / name
        try:
            save_file({key: value.detach().cpu().contiguous() for key, value in content.items()}, path)
        except Exception as error:  # safetensors wraps the operating system's error in its own
            raise OSError(None, str(error)) from error
        _sync(path)
        sums[name] = sha256_of(path)
    return sums


def _publish(working: Path, target: Path, snapshot: Snapshot, sums: dict[str, str], texts: dict[str, str]) -> None:
    for name, text in texts.items():
        (working / name).write_text(text)
        _sync(working / name)
        sums[name] = sha256_of(working / name)
    manifest = {
        "format": FORMAT,
        "round": snapshot.round,
        "identity": snapshot.identity,
        "metrics_position": snapshot.metrics_position,
        "partial": snapshot.partial,
        "utilisation": snapshot.utilisation,
        "files": sums,
    }
    (working / MANIFEST).write_text(json.dumps({**manifest, "checksum": _checksum(manifest)}, indent=1, sort_keys=True))
    _sync(working / MANIFEST)
    _sync(working)
    if target.exists():  # a damaged one, or the same interrupted round saved again
        replaced = target.with_name(f"{_UNFINISHED}replaced-{target.name}")
        _fresh_folder(replaced)
        target.rename(replaced)
    working.rename(target)
    _sync(target.parent)
    remove_unfinished(target.parent)


def _checksum(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_unfinished(root: Path) -> None:
    """Remove what a killed or failed `save` left behind."""
    for leftover in root.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _prune(root: Path, keep: int, written: Path) -> None:
    """Keep the newest `keep` complete rounds; an interrupted round goes as soon as a later checkpoint exists.

    Whatever claims to be newer than the one just written was damaged, or this start would have continued from it.
    """
    complete = [path for path in candidates(root) if path.name <= written.name and not path.name.endswith("-partial")]
    kept = {written, *complete[:keep]}
    for path in candidates(root):
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


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
    """None if every file of a checkpoint is what its manifest says, else what is wrong."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        promised = manifest.pop("checksum")
        files = dict(manifest["files"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return f"{MANIFEST} is missing or unreadable"
    if _checksum(manifest) != promised:
        return f"{MANIFEST} does not match its checksum"
    for name, expected in files.items():
        try:
            if sha256_of(path / name) != expected:
                return f"{name} does not match its checksum"
        except OSError as error:
            return f"{name}: {error.strerror or error}"
    return None


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
