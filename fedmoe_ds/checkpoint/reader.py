"""Checkpoint reader: everything a run needs to continue, readable on any topology.

A checkpoint is a folder: adapters by layer and global expert id in safetensors (one file per expert shard), personal client
state, the sums of an interrupted round if there is one, the configuration, and `manifest.json` with a sha256 per file, which
catches what a disk does later. `writer.py` writes all of it or nothing. No pickle anywhere.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedmoe_ds.checkpoint.manifest import Manifest
from fedmoe_ds.distributed.stop_points import stream_sha256
from fedmoe_ds.errors import UserError
from fedmoe_ds.storage.files import is_plain_name, open_plain
from fedmoe_ds.storage.strict_json import parse_json, tree_sha256

FORMAT = 3
_READ = (2, FORMAT)
"""Formats that are read. Until 3 a personal file held all clients (`personal_reader`)."""
MANIFEST = "manifest.json"
PERSONAL = "personal-"
PRIVATE = (PERSONAL, "sums-")
"""Files of what is a client's own (`file_modes`): the sums of an unfinished round, too, can be those of one client."""
CLIENTS = "clients"
"""Metadata of the first personal file: a JSON list of the names of all clients, in the order of their numbers."""
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
        clock: the virtual clock of simulated devices at the end of it, or None.
        sent_down: numbers of the products that clients of the next round receive.
    """

    round: int
    identity: dict[str, Any]
    metrics_position: int
    partial: dict[str, Any] | None = None
    utilisation: list[list[int]] | None = None
    files: dict[str, str] = field(default_factory=dict)
    clock: dict[str, Any] | None = None
    sent_down: int = 0


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
    # With stop points: personal state of many clients takes minutes, in which the other ranks wait.
    with open(open_plain(path, os.O_RDONLY), "rb", buffering=0) as stream:
        return stream_sha256(stream)


def checksum(manifest: dict[str, Any]) -> str:
    """What the manifest says about itself."""
    return tree_sha256(manifest)


def candidates(root: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    found = [(progress, path) for path in root.glob("round-*") if (progress := progress_of(path)) is not None]
    return [path for _, path in sorted(found, reverse=True)]


def newest_intact(root: Path, unread: tuple[str, ...] = ()) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose checksums hold, and one line for each damaged one that was passed over."""
    notes: list[str] = []
    for path in candidates(root):
        damage = find_damage(path, unread)
        if damage is None:
            return path, notes
        notes.append(f"checkpoint {path.name} is damaged ({damage}); falling back to the one before")
    return None, notes


def find_damage(path: Path, unread: tuple[str, ...] = ()) -> str | None:
    """None if every file of a checkpoint is what its manifest says, else what is wrong.

    Args:
        unread: beginnings of names of files that the caller does not need.
    Raises:
        UserError: it is another user's, who has not let this one read all of it; nothing tells that it is damaged.
    """
    if path.is_symlink():
        return "it is a symbolic link"
    try:
        manifest = _manifest(path)
        promised = manifest.pop("checksum")
        files = dict(manifest["files"])
    except PermissionError as error:
        raise _closed(path / MANIFEST, error) from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # no JSON, or no such tree
        return f"{MANIFEST} is missing or unreadable"
    # Nothing that the manifest says is used before its own checksum holds.
    if checksum(manifest) != promised:
        return f"{MANIFEST} does not match its checksum"
    # With an empty list of files every check below would hold.
    if not tensor_files(files):
        return f"{MANIFEST} lists no tensors"
    for name, expected in files.items():
        # A path in the list could lead out of this folder.
        if not is_plain_name(name):
            return f"{MANIFEST} lists {name!r}, which is no name of a file in this folder"
        if name.startswith(unread):
            continue
        try:
            if sha256_of(path / name) != expected:
                return f"{name} does not match its checksum"
        except PermissionError as error:
            raise _closed(path / name, error) from None
        except OSError as error:
            return f"{name}: {error.strerror or error}"
        except ValueError:  # a NUL
            return f"{name} is no file name"
    return None


def _manifest(path: Path) -> Any:
    with open(open_plain(path / MANIFEST, os.O_RDONLY), "rb") as stream:
        return parse_json(stream.read())


def tensor_files(names: Iterable[str], prefix: str = "") -> list[str]:
    """Names of files that hold tensors, sorted."""
    return sorted(name for name in names if name.startswith(prefix) and name.endswith(".safetensors"))


def _closed(path: Path, error: OSError) -> UserError:
    return UserError(
        f"output: {path}: cannot be read: {error.strerror or error}; what is a client's own only the user who wrote it can "
        "read: continue as that user, or set another name"
    )


def read_snapshot(path: Path) -> Snapshot:
    """The manifest of an intact checkpoint. Raises UserError for one of another format, or with a field of another type."""
    try:
        manifest = _manifest(path)
    except ValueError as error:
        raise _foreign(path, str(error)) from None
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise _foreign(path, "format: missing")
    if manifest["format"] not in _READ:
        raise UserError(
            f"checkpoint: {path}: format {manifest['format']!r}: this version reads formats {_READ[0]} and {_READ[1]}; use "
            "another run name"
        )
    try:
        Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise _foreign(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    # The raw values go on, not the validated model: a report has more fields than `_Report` names.
    return Snapshot(**{name: manifest[name] for name in Manifest.model_fields if name in manifest})


def client_names(path: Path, files: Iterable[str]) -> list[str] | None:
    """The names of all clients in the order of the client axis, out of a checkpoint's personal tensors; None: it does not say.

    Args:
        files: what its manifest lists.
    Raises:
        UserError: the file is damaged, or another user's.
    """
    for name in tensor_files(files, PERSONAL):
        try:
            with safe_open(path / name, framework="pt") as opened:
                told = parse_json((opened.metadata() or {}).get(CLIENTS, "null"))
        except PermissionError as error:
            raise _closed(path / name, error) from None
        except (OSError, SafetensorError, ValueError) as error:
            raise damaged(path / name, error) from None
        # Checkpoints of earlier versions have no names.
        return told if isinstance(told, list) and {type(client) for client in told} <= {str} else None
    return None


def _foreign(path: Path, reason: str) -> UserError:
    """An intact file, and yet not one that this version has written."""
    return UserError(f"checkpoint: {path / MANIFEST}: {reason}; remove this folder to go on from the checkpoint before it")


def damaged(path: Path, error: Exception) -> UserError:
    """A file that holds no tensors, though its checksum may be what the manifest says."""
    return UserError(f"checkpoint: {path}: damaged: {error}; remove this checkpoint")


def no_such_tensor(key: str) -> UserError:
    return UserError(f"checkpoint: {key}: the checkpoint has no such tensor; it belongs to another model or configuration")


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
        # The manifest's list, not the folder's: a file that was put beside it is never opened.
        for name in tensor_files(listed, prefix):
            try:
                opened = self._stack.enter_context(safe_open(path / name, framework="pt"))
            except SafetensorError as error:
                raise damaged(path / name, error) from None
            self._files.update(dict.fromkeys(opened.keys(), opened))

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *details: object) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def read(self, name: str) -> Tensor:
        """One tensor. Raises UserError when the checkpoint has no such tensor."""
        if name not in self._files:
            raise no_such_tensor(name)
        value: Tensor = self._files[name].get_tensor(name)
        return value

    def read_into(self, name: str, place: Tensor) -> None:
        """Copy one tensor into its place. Raises UserError when the checkpoint has no such tensor or another shape."""
        value = self.read(name)
        if value.shape != place.shape:
            raise UserError(f"checkpoint: {name}: shape {tuple(value.shape)}, but this run needs {tuple(place.shape)}")
        with torch.no_grad():
            place.copy_(value)
