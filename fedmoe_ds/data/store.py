"""Prepared sequences or images on disk: one Arrow file with one record batch per owner, and a JSON header beside it.

Where the deal leaves sequences as they are, a store holds row numbers in place of them, and names the store of all sequences:
an entry beside it that is called by its content, so every deal of the same sequences, with any seed, names the same one.

An owner is a client's training set, a client's hold-out, or the global hold-out. A record batch can be read without
touching the others, and its values are handed out as views of the memory map. A store is an entry of the cache, for this user
alone: what clients have written is in it.

Legend: N images, C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedmoe_ds.distributed.stop_points import file_sha256, stop_point
from fedmoe_ds.errors import UserError
from fedmoe_ds.storage import cache
from fedmoe_ds.storage.file_modes import keep_private
from fedmoe_ds.storage.in_use import hold
from fedmoe_ds.storage.strict_json import read_json

DATA = "sequences.arrow"
HEADER = "header.json"
# Targets are bytes, not Arrow's packed bits, so that they too can be viewed in place.
SCHEMA = pa.schema([("tokens", pa.large_list(pa.int64())), ("targets", pa.large_list(pa.uint8()))])
IMAGE_SCHEMA = pa.schema([("pixels", pa.large_list(pa.float32())), ("labels", pa.int64())])
IMAGE_SHAPE = "image_shape"  # in the header of a store of images: [C, H, W]
UNITS = "units"  # in the header of a store of row numbers: the name of the entry that has the sequences
_UNITS_NAME = "units-"
_UNITS_PER_BATCH = 4096
ROWS_SCHEMA = pa.schema([("rows", pa.int64())])
TIERS = "tiers"  # in the header where the data say of which tier each client is


Counts = list[Annotated[int, Field(ge=0, lt=2**63)]]


class _Omissions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    rows: int
    total: dict[str, int]
    clients: dict[str, dict[str, int]]


class _Header(BaseModel):
    """The types of a header's fields."""

    model_config = ConfigDict(strict=True)

    names: list[str]
    samples: Counts
    train_sequences: Counts
    train_tokens: Counts
    train_rows: Counts
    distribution: dict[str, Any]
    sequence_length: Annotated[int, Field(ge=1)]
    fingerprint: str
    omissions: _Omissions
    image_shape: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=3, max_length=3)] | None = None
    tiers: list[str] | None = None
    units: Annotated[str, Field(pattern="^units-[0-9a-f]{32}$")] | None = None
    checksum: str

    @model_validator(mode="after")
    def _counts_every_client(self) -> _Header:
        if {len(self.samples), len(self.train_sequences), len(self.train_tokens), len(self.train_rows)} != {len(self.names)}:
            raise ValueError("expected one count per client")
        if self.tiers is not None and len(self.tiers) != len(self.names):
            raise ValueError("expected one tier per client")
        return self


@dataclass(frozen=True)
class Sequences:
    """What one owner has: variable-length token sequences, or labelled images. Views of a memory map are read-only.

    Text: `input_ids[i]` int64 [length_i], 2 <= length_i <= sequence_length. `loss_mask[i]` bool [length_i], True where the
    token at that position counts as a target, that is, the prediction of token j from the tokens before j; position 0
    never does.

    Images: `pixels` float32 [N, C, H, W] and `labels` int64 [N], both None for text; `input_ids` and `loss_mask` are empty
    then. An image is one sample with one target, its class.
    """

    input_ids: list[NDArray[np.int64]]
    loss_mask: list[NDArray[np.bool_]]
    pixels: NDArray[np.float32] | None = None
    labels: NDArray[np.int64] | None = None

    @classmethod
    def of_images(cls, pixels_NCHW: NDArray[np.float32], labels_N: NDArray[np.int64]) -> Sequences:
        """Labelled images as an owner's samples."""
        assert pixels_NCHW.ndim == 4 and len(pixels_NCHW) == len(labels_N), (pixels_NCHW.shape, labels_N.shape)
        return cls([], [], pixels_NCHW, labels_N)

    def __len__(self) -> int:
        return len(self.input_ids) if self.labels is None else len(self.labels)

    def select(self, rows: Iterable[int]) -> Sequences:
        """Return the sequences or images at `rows`, in that order."""
        chosen = [int(row) for row in rows]
        if self.pixels is not None and self.labels is not None:
            return Sequences.of_images(self.pixels[chosen], self.labels[chosen])
        return Sequences([self.input_ids[row] for row in chosen], [self.loss_mask[row] for row in chosen])

    def target_count(self) -> int:
        """Return the number of targets: of target tokens, or of images."""
        return sum(int(mask.sum()) for mask in self.loss_mask) if self.labels is None else len(self.labels)

    def row_count(self) -> int:
        """Return the number of token rows: of tokens, or of images, whose positions are the foundation's to say."""
        return sum(map(len, self.input_ids)) if self.labels is None else len(self.labels)


class Store:
    """A prepared folder, opened memory-mapped."""

    def __init__(self, folder: Path) -> None:
        """Open `folder`; raises OSError, ValueError or KeyError where it is missing or damaged."""
        self.header: dict[str, Any] = read_json(folder / HEADER)
        self._lengths: NDArray[np.int64] | None = None
        self._views: dict[int, tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]] = {}
        hold(folder)
        self._reader = pa.ipc.open_file(pa.memory_map(str(folder / DATA)))
        # Beside it and nowhere else, whatever the header says.
        self._units = Store(folder.with_name(Path(name).name)) if (name := self.header.get(UNITS)) is not None else None

    def read(self, owner: int) -> Sequences:
        """Return one owner's sequences or images as views of the memory map."""
        if self._units is not None:
            return self._units.pick(self._rows(owner))
        # zero_copy_only below: a silent copy would put a rank's whole data into its own memory.
        batch = self._reader.get_batch(owner)
        if (shape := self.header.get(IMAGE_SHAPE)) is not None:
            pixels_NCHW = batch.column("pixels").values.to_numpy(zero_copy_only=True).reshape(-1, *shape)
            return Sequences.of_images(pixels_NCHW, batch.column("labels").to_numpy(zero_copy_only=True))
        tokens, targets = batch.column("tokens"), batch.column("targets")
        # Tokens and targets have the same lengths, so one list of offsets serves both.
        bounds = tokens.offsets.to_numpy().tolist()
        ids = tokens.values.to_numpy(zero_copy_only=True)
        mask = targets.values.to_numpy(zero_copy_only=True).view(np.bool_)
        spans = list(itertools.pairwise(bounds))
        return Sequences([ids[a:b] for a, b in spans], [mask[a:b] for a, b in spans])

    def pick(self, rows: NDArray[np.int64]) -> Sequences:
        """Return the sequences with these numbers, in that order; this store is one of units."""
        ids, masks = [], []
        for row in rows.tolist():
            bounds, tokens, targets = self._unit_batch(row // _UNITS_PER_BATCH)
            place = row % _UNITS_PER_BATCH
            ids.append(tokens[bounds[place] : bounds[place + 1]])
            masks.append(targets[bounds[place] : bounds[place + 1]])
        return Sequences(ids, masks)

    def _rows(self, owner: int) -> NDArray[np.int64]:
        rows: NDArray[np.int64] = self._reader.get_batch(owner).column("rows").to_numpy(zero_copy_only=True)
        return rows

    def _unit_batch(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """Bounds of a batch's sequences, its tokens and its targets: views of the memory map, made once."""
        if number not in self._views:
            batch = self._reader.get_batch(number)
            tokens, targets = batch.column("tokens"), batch.column("targets").values.to_numpy(zero_copy_only=True)
            values = tokens.values.to_numpy(zero_copy_only=True)
            self._views[number] = tokens.offsets.to_numpy(), values, targets.view(np.bool_)
        return self._views[number]

    def lengths(self, owner: int) -> NDArray[np.int64]:
        """Return the tokens of each of an owner's sequences, from the offsets alone."""
        assert IMAGE_SHAPE not in self.header, "images have no length"
        if self._units is not None:
            return self._units.lengths_of(self._rows(owner))
        lengths: NDArray[np.int64] = np.diff(self._reader.get_batch(owner).column("tokens").offsets.to_numpy())
        return lengths

    def lengths_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the tokens of the sequences with these numbers; this store is one of units."""
        if self._lengths is None:
            batches = range(self._reader.num_record_batches)
            every = [np.diff(self._unit_batch(number)[0]) for number in batches]
            self._lengths = np.concatenate([np.empty(0, np.int64), *every])
        return self._lengths[rows]


def fingerprint(owners: Iterable[Sequences]) -> str:
    """Return the sha256 over all tokens and targets, or pixels and labels, owner by owner, whatever the file format."""
    content = hashlib.sha256()
    for owner in owners:
        stop_point()
        if owner.pixels is not None and owner.labels is not None:
            content.update(np.array(owner.pixels.shape, dtype="<i8").tobytes())
            content.update(owner.pixels.astype("<f4", copy=False).tobytes())
            content.update(owner.labels.astype("<i8", copy=False).tobytes())
            continue
        # Lengths first: the same tokens cut into other sequences are other data. Byte order and widths are fixed.
        content.update(np.array([len(owner), *map(len, owner.input_ids)], dtype="<i8").tobytes())
        for ids, mask in zip(owner.input_ids, owner.loss_mask, strict=True):
            content.update(ids.astype("<i8", copy=False).tobytes())
            content.update(mask.tobytes())
    return content.hexdigest()


def intact(folder: Path) -> bool:
    """Whether the files in `folder` are complete and still have the checksums that the header promises."""
    try:
        header = read_json(folder / HEADER)
        # The header is checked whole before its checksum is believed: a readable one may come from anywhere.
        promised = _Header.model_validate(header).checksum
        return promised == file_sha256(folder / DATA) and cache.seal_holds(header)
    except (OSError, ValueError):
        return False


def usable(folder: Path) -> bool:
    """Whether a store is there that is intact and that nobody else can have written. Raises OSError where it cannot be read.

    What earlier versions have left readable to others is closed.
    """
    found = cache.usable(folder, lambda: intact(folder)) and _has_units(folder)
    for path in (folder.parent, folder, folder / DATA, folder / HEADER) if found else ():
        # Only their owner may change modes; what root has put there for everybody stays as it is.
        if path.stat().st_uid == os.geteuid() and path.stat().st_mode & 0o077:
            keep_private(path)
    return found


def _has_units(folder: Path) -> bool:
    """Whether the sequences that a store names are there as well; they may have been damaged, or cleaned away."""
    name = read_json(folder / HEADER).get(UNITS)
    return name is None or usable(folder.with_name(name))


def write_units(parent: Path, units: Sequences, header: dict[str, Any]) -> str:
    """Write the store of all sequences unless it is there, and return its name, which its content decides."""
    name = f"{_UNITS_NAME}{fingerprint([units])[:32]}"
    if not usable(parent / name):
        starts = range(0, len(units), _UNITS_PER_BATCH)
        batches = [units.select(range(start, min(start + _UNITS_PER_BATCH, len(units)))) for start in starts]
        counts: dict[str, Any] = {key: [] for key in ("names", "samples", "train_sequences", "train_tokens", "train_rows")}
        none = counts | {"distribution": {}}
        omissions = {"rows": len(units), "total": {}, "clients": {}}
        write_store(parent / name, batches, header | none | {"omissions": omissions})
    return name


def write_store(
    folder: Path, owners: Sequence[Sequences], header: dict[str, Any], rows: Sequence[NDArray[np.int64]] | None = None
) -> None:
    """Write a store and let it appear at `folder` in one step; with `rows`, of numbers into the store that the header names.

    The fingerprint and the file's checksum are added to the header. Raises OSError where the disk is full, and leaves
    nothing behind then. Where another process was faster, its store stays: equal names mean equal content.
    """
    with cache.draft(folder, lambda: usable(folder)) as draft:
        schema = ROWS_SCHEMA if rows is not None else SCHEMA if header.get(IMAGE_SHAPE) is None else IMAGE_SCHEMA
        with pa.OSFile(str(draft / DATA), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for owner in owners if rows is None else rows:
                stop_point()
                writer.write_batch(_batch(owner) if isinstance(owner, Sequences) else pa.record_batch([owner], schema=schema))
        # The fingerprint is over the content, the checksum over the file: the first outlives a change of format.
        sums = {"fingerprint": fingerprint(owners), "checksum": file_sha256(draft / DATA)}
        (draft / HEADER).write_text(json.dumps(cache.sealed(header | sums), indent=1, ensure_ascii=False), encoding="utf-8")


def storage_error(folder: Path, error: OSError) -> UserError:
    """Return the one line for a folder that cannot be written."""
    return UserError(
        f"foundation.cache: {folder}: prepared data cannot be written: {error.strerror or error}; "
        "free some space or choose another folder"
    )


def _batch(owner: Sequences) -> pa.RecordBatch:
    if owner.pixels is not None:
        size = int(np.prod(owner.pixels.shape[1:]))
        bounds = pa.array(np.arange(len(owner) + 1) * size, type=pa.int64())
        pixels = pa.LargeListArray.from_arrays(bounds, pa.array(owner.pixels.reshape(-1)))
        return pa.record_batch([pixels, pa.array(owner.labels)], schema=IMAGE_SCHEMA)
    bounds = pa.array(np.cumsum([0, *map(len, owner.input_ids)]), type=pa.int64())
    # An empty array first, for an owner without any sequence: concatenate refuses an empty list.
    ids = np.concatenate([np.empty(0, np.int64), *owner.input_ids])
    mask = np.concatenate([np.empty(0, np.bool_), *owner.loss_mask]).view(np.uint8)
    lists = [pa.LargeListArray.from_arrays(bounds, pa.array(values)) for values in (ids, mask)]
    return pa.record_batch(lists, schema=SCHEMA)
