"""Prepared sequences or images on disk: one Arrow file of them, one of the clients (`client_table`), and a JSON header.

Where the deal leaves sequences as they are, a store holds row numbers in place of them, and names the store of all sequences:
an entry beside it that is called by its content, so every deal of the same sequences, with any seed, names the same one.

An owner is a client's training set, a client's hold-out, or the global hold-out. Sequences lie in the order of the owners, so
many a record batch; images are one batch an owner. A batch can be read without touching the others, and its values are handed
out as views of the memory map. A store is an entry of the cache, for this user alone: what clients have written is in it.

What earlier versions have prepared is read as well: one record batch an owner, and the clients in the header.

Legend: N images, C channels, H height, W width.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedmoe_ds.data import client_table
from fedmoe_ds.data.client_table import ClientTable, write_clients
from fedmoe_ds.data.dealing import Prepared
from fedmoe_ds.data.ragged import Ragged
from fedmoe_ds.data.sequences import Sequences, fingerprint
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
SCORES = pa.field("scores", pa.float32())  # one column more, where the data's form knows something of every image
IMAGE_SHAPE = "image_shape"  # in the header of a store of images: [C, H, W]
UNITS = "units"  # in the header of a store of row numbers: the name of the entry that has the sequences
_UNITS_NAME = "units-"
_PER_BATCH = 4096
ROWS_SCHEMA = pa.schema([("rows", pa.int64())])
PUBLIC = "public"  # in the header, where the last but one of the owners is the server
CLIENTS = "clients"  # in the header where the clients are columns beside it: the checksum of these

Counts = list[Annotated[int, Field(ge=0, lt=2**63)]]


class _Omissions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    rows: int
    total: dict[str, int]
    clients: dict[str, dict[str, int]]


class _Header(BaseModel):
    """The types of a header's fields; `clients` is the checksum of the clients' columns."""

    model_config = ConfigDict(strict=True)

    sequence_length: Annotated[int, Field(ge=1)]
    fingerprint: str
    omissions: _Omissions
    image_shape: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=3, max_length=3)] | None = None
    units: Annotated[str, Field(pattern="^units-[0-9a-f]{32}$")] | None = None
    checksum: str
    clients: str | None = None
    public: bool = False
    labels: list[str] = []
    owned: Annotated[int, Field(ge=0)] = 0


class _InlineHeader(_Header):
    """A header with the clients in it: that of a store of units, which has none, and of what earlier versions wrote."""

    names: list[str]
    samples: Counts
    train_sequences: Counts
    train_tokens: Counts
    train_rows: Counts
    distribution: dict[str, Any]
    tiers: list[str] | None = None

    @model_validator(mode="after")
    def _counts_every_client(self) -> _InlineHeader:
        if {len(self.samples), len(self.train_sequences), len(self.train_tokens), len(self.train_rows)} != {len(self.names)}:
            raise ValueError("expected one count per client")
        if self.tiers is not None and len(self.tiers) != len(self.names):
            raise ValueError("expected one tier per client")
        return self


class Store:
    """A prepared folder, opened memory-mapped. `clients` is what it says of them."""

    def __init__(self, folder: Path) -> None:
        """Open `folder`; raises OSError, ValueError or KeyError where it is missing or damaged."""
        self.header: dict[str, Any] = read_json(folder / HEADER)
        self._lengths: NDArray[np.int64] | None = None
        self._numbers: NDArray[np.int64] | None = None
        self._views: dict[int, tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]] = {}
        hold(folder)
        self._reader = pa.ipc.open_file(pa.memory_map(str(folder / DATA)))
        # Beside it and nowhere else, whatever the header says.
        self._units = Store(folder.with_name(Path(name).name)) if (name := self.header.get(UNITS)) is not None else None
        if CLIENTS in self.header:
            self.clients = ClientTable.open(folder / client_table.FILE, self.header["labels"])
            if self.header.get(PUBLIC):
                self.clients = self.clients.of_clients()
        else:
            self.clients = ClientTable.of_header(self.header)
        # One record batch an owner: images, and whatever earlier versions wrote.
        self._by_batch = self.clients.bounds is None or IMAGE_SHAPE in self.header

    def read(self, owner: int) -> Sequences:
        """Return one owner's sequences or images as views of the memory map."""
        if not self._by_batch or self._units is not None:
            return (self._units or self).pick(self._rows(owner))
        # zero_copy_only below: a silent copy would put a rank's whole data into its own memory.
        if (shape := self.header.get(IMAGE_SHAPE)) is not None:
            batch = self._reader.get_batch(owner)
            pixels_NCHW = batch.column("pixels").values.to_numpy(zero_copy_only=True).reshape(-1, *shape)
            scored = SCORES.name in batch.schema.names
            scores_N = batch.column(SCORES.name).to_numpy(zero_copy_only=True) if scored else None
            return Sequences.of_images(pixels_NCHW, batch.column("labels").to_numpy(zero_copy_only=True), scores_N)
        bounds, ids, mask = self._batch(owner)
        spans = list(itertools.pairwise(bounds.tolist()))
        return Sequences([ids[a:b] for a, b in spans], [mask[a:b] for a, b in spans])

    def pick(self, rows: NDArray[np.int64]) -> Sequences:
        """Return the sequences with these numbers, in that order; no batch here is one owner's."""
        ids, masks = [], []
        for row in rows.tolist():
            bounds, tokens, targets = self._batch(row // _PER_BATCH)
            place = row % _PER_BATCH
            ids.append(tokens[bounds[place] : bounds[place + 1]])
            masks.append(targets[bounds[place] : bounds[place + 1]])
        return Sequences(ids, masks)

    def _rows(self, owner: int) -> NDArray[np.int64]:
        """The numbers of an owner's sequences: into the store of units, or into this one."""
        if self._by_batch:
            rows: NDArray[np.int64] = self._reader.get_batch(owner).column("rows").to_numpy(zero_copy_only=True)
            return rows
        bounds = self.clients.bounds
        assert bounds is not None and 0 <= owner < len(bounds)
        # The global hold-out has what is left.
        start, end = int(bounds[owner]), int(bounds[owner + 1]) if owner + 1 < len(bounds) else int(self.header["owned"])
        if self._units is None:
            return np.arange(start, end)
        return self._row_numbers()[start:end]

    def _row_numbers(self) -> NDArray[np.int64]:
        """The numbers of all owners' sequences in the store of units, owner by owner: a view, made once."""
        if self._numbers is None:
            self._numbers = self._reader.get_batch(0).column("rows").to_numpy(zero_copy_only=True)
        return self._numbers

    def _batch(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """Bounds of a batch's sequences, its tokens and its targets: views of the memory map, made once."""
        if number not in self._views:
            batch = self._reader.get_batch(number)
            # Tokens and targets have the same lengths, so one list of offsets serves both.
            tokens, targets = batch.column("tokens"), batch.column("targets").values.to_numpy(zero_copy_only=True)
            values = tokens.values.to_numpy(zero_copy_only=True)
            self._views[number] = tokens.offsets.to_numpy(), values, targets.view(np.bool_)
        return self._views[number]

    def lengths(self, owner: int) -> NDArray[np.int64]:
        """Return the tokens of each of an owner's sequences, from the offsets alone."""
        assert IMAGE_SHAPE not in self.header, "images have no length"
        if not self._by_batch or self._units is not None:
            return (self._units or self).lengths_of(self._rows(owner))
        return np.diff(self._batch(owner)[0])

    def lengths_of_owners(self, owners: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the lengths of all sequences of some owners, which ascend; none of them is the global hold-out."""
        bounds = self.clients.bounds
        if bounds is None:
            return np.concatenate([np.empty(0, np.int64), *map(self.lengths, owners.tolist())])
        # All at once: a call an owner would be seconds for a million of them.
        taken = np.zeros(len(bounds) - 1, dtype=bool)
        taken[owners] = True
        rows = np.flatnonzero(np.repeat(taken, np.diff(bounds)))
        return (self._units or self).lengths_of(rows if self._units is None else self._row_numbers()[rows])

    def lengths_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the tokens of the sequences with these numbers; no batch here is one owner's."""
        if self._lengths is None:
            batches = range(self._reader.num_record_batches)
            every = [np.diff(self._batch(number)[0]) for number in batches]
            self._lengths = np.concatenate([np.empty(0, np.int64), *every])
        return self._lengths[rows]


def intact(folder: Path) -> bool:
    """Whether the files in `folder` are complete and still have the checksums that the header promises."""
    try:
        header = read_json(folder / HEADER)
        # The header is checked whole before its checksums are believed: a readable one may come from anywhere.
        kind = _Header if isinstance(header, dict) and CLIENTS in header else _InlineHeader
        promised = kind.model_validate(header)
        sums = {DATA: promised.checksum, **({client_table.FILE: promised.clients} if kind is _Header else {})}
        return all(found == file_sha256(folder / name) for name, found in sums.items()) and cache.seal_holds(header)
    except (OSError, ValueError):
        return False


def usable(folder: Path) -> bool:
    """Whether a store is there that is intact and that nobody else can have written. Raises OSError where it cannot be read.

    What earlier versions have left readable to others is closed.
    """
    found = cache.usable(folder, lambda: intact(folder)) and _has_units(folder)
    for path in (folder.parent, folder, *folder.iterdir()) if found else ():
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
    every = np.arange(len(units))
    print_of_all = fingerprint(units, Ragged.joined([every]))
    name = f"{_UNITS_NAME}{print_of_all[:32]}"
    if not usable(parent / name):
        counts: dict[str, Any] = {key: [] for key in ("names", "samples", "train_sequences", "train_tokens", "train_rows")}
        omissions = {"rows": len(units), "total": {}, "clients": {}}
        told = {**header, **counts, "distribution": {}, "omissions": omissions, "fingerprint": print_of_all}
        with cache.draft(parent / name, lambda: usable(parent / name)) as draft:
            _write_batches(draft / DATA, SCHEMA, _text_batches(units, every))
            _write_header(draft, told)
    return name


def write_store(folder: Path, prepared: Prepared, header: dict[str, Any], units: str | None = None) -> None:
    """Write a store and let it appear at `folder` in one step: of row numbers into the store `units`, or of the content itself.

    The fingerprint and the files' checksums are added to the header. Raises OSError where the disk is full, and leaves
    nothing behind then. Where another process was faster, its store stays: equal names mean equal content.
    """
    content, owned = prepared.content, prepared.owned
    with cache.draft(folder, lambda: usable(folder)) as draft:
        if units is not None:
            _write_batches(draft / DATA, ROWS_SCHEMA, [pa.record_batch([pa.array(owned.values_N)], schema=ROWS_SCHEMA)])
            header = {**header, UNITS: units}
        elif content.labels is not None:
            schema = IMAGE_SCHEMA if content.scores is None else IMAGE_SCHEMA.append(SCORES)
            _write_batches(draft / DATA, schema, (_image_batch(content.select(own), schema) for own in owned))
        else:
            _write_batches(draft / DATA, SCHEMA, _text_batches(content, owned.values_N))
        write_clients(prepared, draft / client_table.FILE)
        told = {"labels": prepared.labels, "owned": len(owned.values_N), CLIENTS: file_sha256(draft / client_table.FILE)}
        # Absent where there is none, as in what earlier versions have written.
        told |= {PUBLIC: True} if prepared.public else {}
        # The fingerprint is over the content, the checksums over the files: the first outlives a change of format.
        _write_header(draft, {**header, **told, "fingerprint": fingerprint(content, owned)})


def _write_batches(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for batch in batches:
            stop_point()
            writer.write_batch(batch)


def _write_header(draft: Path, header: dict[str, Any]) -> None:
    sealed = cache.sealed({**header, "checksum": file_sha256(draft / DATA)})
    (draft / HEADER).write_text(json.dumps(sealed, indent=1, ensure_ascii=False), encoding="utf-8")


def storage_error(folder: Path, error: OSError) -> UserError:
    """Return the one line for a folder that cannot be written."""
    return UserError(
        f"foundation.cache: {folder}: prepared data cannot be written: {error.strerror or error}; "
        "free some space or choose another folder"
    )


def _image_batch(owner: Sequences, schema: pa.Schema) -> pa.RecordBatch:
    assert owner.pixels is not None
    size = int(np.prod(owner.pixels.shape[1:]))
    bounds = pa.array(np.arange(len(owner) + 1) * size, type=pa.int64())
    pixels = pa.LargeListArray.from_arrays(bounds, pa.array(owner.pixels.reshape(-1)))
    scores = [] if owner.scores is None else [pa.array(owner.scores)]
    return pa.record_batch([pixels, pa.array(owner.labels), *scores], schema=schema)


def _text_batches(content: Sequences, rows: NDArray[np.int64]) -> Iterator[pa.RecordBatch]:
    """The sequences at `rows`, so many a batch, whoever owns them: a batch an owner would be a million of them."""
    for start in range(0, len(rows), _PER_BATCH):
        some = content.select(rows[start : start + _PER_BATCH].tolist())
        bounds = pa.array(np.cumsum([0, *map(len, some.input_ids)]), type=pa.int64())
        ids, mask = np.concatenate(some.input_ids), np.concatenate(some.loss_mask).view(np.uint8)
        lists = [pa.LargeListArray.from_arrays(bounds, pa.array(values)) for values in (ids, mask)]
        yield pa.record_batch(lists, schema=SCHEMA)
