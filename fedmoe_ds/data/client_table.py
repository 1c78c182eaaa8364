"""The clients of a prepared folder as columns of one Arrow file, which ranks of a host map together.

Per client: its name, where what it has ends among the rows of all owners, sums over its training set, what it was dealt of each
label and, where the data say it, its tier. A million clients are some ten megabytes, and no JSON.

Legend: C clients, S labels that are shown.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from numpy.typing import NDArray

from fedmoe_ds.data.dealing import Prepared

Ints = NDArray[np.int64]
FILE = "clients.arrow"
_COUNTS, _TIER = "units_of_label", "tier"
_INLINE_TIERS = "tiers"
_PER_CLIENT = ("names", "samples", "train_tokens", "train_rows", "counts_CS", "tiers")


def write_clients(prepared: Prepared, path: Path) -> None:
    """Write the columns. Raises OSError."""
    # Owners lie in pairs, train then hold-out; the global hold-out is the last one.
    train, ends_C2 = prepared.owned, prepared.owned.bounds[1:-1].reshape(-1, 2)
    # The public split has a row as well, the last: what is counted of it is what lies there.
    beside = len(ends_C2) - len(prepared.names)
    columns: dict[str, Any] = {"name": pa.array([*prepared.names, *[""] * beside], pa.string())}
    columns |= {"train_end": pa.array(ends_C2[:, 0]), "holdout_end": pa.array(ends_C2[:, 1])}
    for name, counts in (("train_tokens", prepared.content.targets_N()), ("train_rows", prepared.content.rows_N())):
        columns[name] = pa.array(train.totals_P(counts)[:-1:2])
    # In the narrowest type: most counts of many labels are zeros and ones.
    counts_CS = np.pad(prepared.counts_CS, ((0, beside), (0, 0)))
    counts = counts_CS.reshape(-1).astype(np.min_scalar_type(counts_CS.max(initial=0)))
    columns[_COUNTS] = pa.FixedSizeListArray.from_arrays(pa.array(counts), len(prepared.labels))
    if prepared.tiers is not None:
        # Of few different words: a number a client, and each word once.
        columns[_TIER] = pa.array([*prepared.tiers, *[""] * beside], pa.string()).dictionary_encode()
    batch = pa.record_batch(columns)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


@dataclass(frozen=True)
class ClientTable:
    """What is said of every client.

    Attributes:
        names: of the clients, in canonical order.
        samples, train_tokens, train_rows: int64 [C], of the training sets.
        labels: what `counts_CS` counts, int64 [C, S].
        tiers: of every client; None where the data do not say them.
        bounds: int64 [2 C + 1], where the rows of every owner but the global hold-out begin and end; None: nothing says it.
    """

    names: list[str]
    samples: Ints
    train_tokens: Ints
    train_rows: Ints
    labels: list[str]
    counts_CS: Ints
    tiers: list[str] | None
    bounds: Ints | None

    @classmethod
    def open(cls, path: Path, labels: list[str]) -> ClientTable:
        """Map the columns of `write_clients`. Raises OSError and ValueError where they are missing or damaged."""
        batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        ends_C2 = np.stack([_whole(batch, "train_end"), _whole(batch, "holdout_end")], axis=1)
        bounds = np.concatenate([np.zeros(1, np.int64), ends_C2.reshape(-1)])
        counts = batch.column(_COUNTS)
        return cls(
            batch.column("name").to_pylist(),
            np.diff(bounds)[::2].copy(),
            _whole(batch, "train_tokens"),
            _whole(batch, "train_rows"),
            labels,
            counts.values.to_numpy(zero_copy_only=True).reshape(-1, counts.type.list_size),
            _words(batch.column(_TIER)) if _TIER in batch.schema.names else None,
            bounds,
        )

    @classmethod
    def of_header(cls, header: dict[str, Any]) -> ClientTable:
        """What earlier versions wrote into the header as lists. Raises KeyError where something is missing."""
        samples, tokens, rows = (np.array(header[key], np.int64) for key in ("samples", "train_tokens", "train_rows"))
        labels, names = header["distribution"].get("labels", []), header["names"]
        counts_CS = np.array(header["distribution"].get("counts", []), np.int64).reshape(len(names), len(labels))
        return cls(names, samples, tokens, rows, labels, counts_CS, header.get(_INLINE_TIERS), None)

    def of_clients(self) -> ClientTable:
        """Without the last row, that of a public split; the bounds stay those of all rows."""
        own = {name: value[:-1] for name in _PER_CLIENT if (value := getattr(self, name)) is not None}
        return replace(self, **own)

    @property
    def distribution(self) -> dict[str, Any]:
        """{"labels": [...], "counts": [client][label]}, as lists."""
        return {"labels": self.labels, "counts": self.counts_CS.tolist()}


def _whole(batch: Any, name: str) -> Ints:
    found: Ints = batch.column(name).to_numpy(zero_copy_only=True)
    return found


def _words(column: Any) -> list[str]:
    words = column.dictionary.to_pylist()
    return [words[code] for code in column.indices.to_numpy().tolist()]
