"""Weight files: the safetensors files of a model folder, and reading of their tensors into memory that the caller provides."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedmoe_ds.distributed.stop_points import stop_point
from fedmoe_ds.errors import UserError
from fedmoe_ds.foundation.meta_model import CONFIG_FILE, first_line
from fedmoe_ds.foundation.tensor_names import present_name
from fedmoe_ds.storage.files import is_plain_name
from fedmoe_ds.storage.strict_json import read_json

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_LONGEST_NAME = 255
"""Bytes of a file's name, on any file system that Linux has."""

# Every page read from a mapped file counts as resident memory until the file is closed: reopen after this many bytes.
BYTES_PER_OPEN = 64 * 2**20


Part = slice | tuple[slice, ...]
"""Some of a tensor: of its rows, or of every axis."""


@dataclass(frozen=True)
class Read:
    """One tensor (or a part of it) of the checkpoint and the memory that receives it."""

    name: str
    target: Tensor
    part: Part | None = None


class WeightFiles:
    """Which safetensors file of a model folder holds which tensor, under the names of the transformers 5 model."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError: there are no weights or two sets of them, the index is damaged, or a file of it is missing."""
        self.folder = folder
        index, single = folder / INDEX_FILE, folder / WEIGHTS_FILE
        if index.is_file():
            stored = _indexed(index)
            if single.is_file() and single not in stored.values():
                raise UserError(
                    f"foundation.path: {folder}: holds both {WEIGHTS_FILE} and {INDEX_FILE} of other files; remove the "
                    "one that is not of this model"
                )
        elif single.is_file():
            with open_weights(single) as file:
                stored = dict.fromkeys(file.keys(), single)
        else:
            raise UserError(f"foundation.path: {folder}: {_without_weights(folder)}")
        self.list = index if index.is_file() else single
        self.where = {present_name(name): (path, name) for name, path in stored.items()}

    def __contains__(self, name: str) -> bool:
        return name in self.where

    @property
    def paths(self) -> list[Path]:
        """All weight files, in name order."""
        return sorted({path for path, _ in self.where.values()})

    def load(self, reads: list[Read]) -> None:
        """Fill every target, file by file, converting to its dtype and device.

        Raises:
            UserError: a tensor or file is missing, damaged, quantised, of another shape, or has a number that is not finite.
        """
        missing = sorted({read.name for read in reads if read.name not in self.where})
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise UserError(f"foundation.path: {self.list}: no tensor '{missing[0]}'{more}; get the whole model")
        for path, batch in self._batches(reads):
            with open_weights(path) as file:
                for read in batch:
                    stop_point()
                    self._copy(file, path, read)

    def _batches(self, reads: list[Read]) -> Iterator[tuple[Path, list[Read]]]:
        by_file: dict[Path, list[Read]] = {}
        for read in reads:
            by_file.setdefault(self.where[read.name][0], []).append(read)
        for path in sorted(by_file):
            batch: list[Read] = []
            size = 0
            for read in by_file[path]:
                batch.append(read)
                size += read.target.nbytes
                if size >= BYTES_PER_OPEN:
                    yield path, batch
                    batch, size = [], 0
            yield path, batch

    def _copy(self, file: Any, path: Path, read: Read) -> None:
        stored = self.where[read.name][1]
        try:
            source: Tensor = file.get_tensor(stored) if read.part is None else file.get_slice(stored)[read.part]
        except SafetensorError as error:
            raise UserError(
                f"foundation.path: {path}: tensor '{stored}' cannot be read: {first_line(error)}; get the whole model"
            ) from error
        # float8 is a floating point type to torch, but its scales lie in tensors of their own.
        if not source.is_floating_point() or source.itemsize < 2:
            raise UserError(
                f"foundation.path: {path}: tensor '{stored}' is {source.dtype}; give weights that are not quantised"
            )
        if source.shape != read.target.shape:
            raise UserError(
                f"foundation.path: {path}: tensor '{stored}' has shape {tuple(source.shape)}, {CONFIG_FILE} implies "
                f"{tuple(read.target.shape)}; config and weights belong to different models"
            )
        if source.numel() and not all(bound.isfinite() for bound in source.aminmax()):  # one pass, and no memory
            raise UserError(f"foundation.path: {path}: tensor '{stored}' has numbers that are not finite; get the file again")
        read.target.copy_(source)


def _indexed(index: Path) -> dict[str, Path]:
    """The file of every tensor, from an index; all of them are there and can be read."""
    tree = _read_json(index)
    places = tree.get("weight_map") if isinstance(tree, dict) else None
    if not isinstance(places, dict) or not places:
        raise UserError(f"foundation.path: {index}: holds no weight_map; get the file again")
    for name, file in places.items():
        if not is_plain_name(file) or len(os.fsencode(file)) > _LONGEST_NAME:
            raise UserError(
                f"foundation.path: {index}: weight_map: '{name}': {file}: no file of this folder; get the file again"
            )
    # All files, also those that hold nothing for this rank: the model is whole, or every rank refuses it.
    for file in sorted(set(places.values())):
        _check_file(index.parent / file)
    return {name: index.parent / file for name, file in places.items()}


def _check_file(path: Path) -> None:
    """Raise UserError unless a weight file can be read, before all ranks begin to."""
    if not path.is_file():
        raise UserError(f"foundation.path: {path}: missing weight file; get the whole model")
    # access() asks for the real user unless told otherwise; open() asks for the effective one.
    if not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
        raise UserError(f"foundation.path: {path}: cannot be read; give this user the right to read it")


def _without_weights(folder: Path) -> str:
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
    other = f"; {pickled[0]} is not read" if pickled else ""
    return f"holds no {WEIGHTS_FILE}{other}; save the model with safetensors (save_pretrained does)"


def open_weights(path: Path) -> Any:
    """An open safetensors file. Raises UserError where there is none, or a damaged one."""
    _check_file(path)
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"foundation.path: {path}: damaged weight file: {first_line(error)}; get the file again") from error


def _read_json(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"foundation.path: {path}: cannot be read: {first_line(error)}; get the file again") from error
