"""Mapped weights: a file of tensors in their final layout, written once per machine, mapped by every process that wants them.

The mapping is copy-on-write. As long as processes only read, their pages are those of the page cache: one copy for all of them.
A process that writes (FLoRA merges products into frozen weights) gets its own copy of those pages, and nobody else sees it.
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedmoe_ds.distributed.stop_points import file_sha256
from fedmoe_ds.foundation import file_sums
from fedmoe_ds.storage import cache
from fedmoe_ds.storage.strict_json import read_json, tree_sha256

FORMAT = 1
ALIGNMENT = 64
"""Bytes; what torch gives its own CPU tensors. Kernels may be slower, and round differently, below it."""
DATA, HEADER = "weights.bin", "header.json"
_LIBRARIES = ("torch", "transformers", "deepspeed")  # they decide the layout


@dataclass(frozen=True)
class Slot:
    """One tensor of the loaded model in its final layout, contiguous."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def empty(self, device: torch.device) -> Tensor:
        """Memory of this process's own."""
        return torch.empty(self.shape, dtype=self.dtype, device=device)


Memory = dict[str, Tensor]
"""Tensors by the names of their slots."""


class MappedWeights:
    """Tensors in `<root>/<key>`; the key is a hash of everything that decides their bytes.

    Args:
        root: a folder that may be on any file system; nothing in it is ever needed again, so it can be deleted.
        fingerprint: of the foundation.
        part: what of it this is, where shape and name do not say so.
        slots: the tensors.
        sums: where the file's sum is remembered (`file_sums.py`); None: every look reads all of it.
    """

    def __init__(self, root: Path, fingerprint: str, part: str, slots: list[Slot], sums: Path | None = None) -> None:
        assert slots, part
        self.slots, self.sums, self._offsets = slots, sums, list[int]()
        end = 0
        for slot in slots:
            self._offsets.append(end)
            end += -(-slot.nbytes // ALIGNMENT) * ALIGNMENT  # rounded up
        self.nbytes = end
        places = zip(slots, self._offsets, strict=True)
        self._content: dict[str, Any] = {
            "format": FORMAT,
            "foundation": fingerprint,
            "part": part,
            "libraries": {name: version(name) for name in _LIBRARIES},
            "tensors": [[slot.name, str(slot.dtype), list(slot.shape), offset] for slot, offset in places],
        }
        self.folder = root / tree_sha256(self._content)[:32]

    def ensure(self, fill: Callable[[Memory], None]) -> None:
        """Have the file there, whole: written by `fill` unless one is found that is intact and nobody else can have written.

        Raises:
            OSError: the folder cannot be written, or the disk is full; nothing is left behind then.
        """
        if self._usable():
            return
        # Not flushed: the first start after a crash of this machine reads all of it.
        with cache.draft(self.folder, self._usable, flush=False) as draft:
            self._write(draft / DATA, fill)
            found = file_sha256(draft / DATA)
            header = {**self._content, "sha256": found}
            (draft / HEADER).write_text(json.dumps(header, indent=1), encoding="utf-8")
        # Another writer may have been faster; then what is known here is not about the file that is there.
        if self.sums is not None and self._header()["sha256"] == found:
            file_sums.remember_written(self.folder / DATA, found, self.sums)

    def intact(self) -> bool:
        """Whether the file is there with every byte that was written: a torn one is found, as is one that was changed since."""
        try:
            file = self.folder / DATA
            found = file_sha256(file) if self.sums is None else file_sums.file_sum(file, self.sums)
            return bool(self._header()["sha256"] == found)
        except (OSError, ValueError, KeyError):
            return False

    def map(self) -> Memory:
        """The tensors, mapped copy-on-write. Not populated in advance: that would write, and so copy, every page.

        Raises:
            OSError: there is no such file, or one of another size.
            ValueError: its header is damaged.
        """
        self._header()
        with (self.folder / DATA).open("rb") as file:
            if os.fstat(file.fileno()).st_size != self.nbytes:
                raise OSError(errno.EIO, f"{self.folder / DATA} does not have {self.nbytes} bytes")
            return self._tensors(mmap.mmap(file.fileno(), self.nbytes, access=mmap.ACCESS_COPY))

    def _header(self) -> dict[str, Any]:
        header = read_json(self.folder / HEADER)
        if not isinstance(header, dict) or {**self._content, "sha256": header.get("sha256")} != header:
            raise ValueError(f"{self.folder / HEADER} describes other weights")
        return header

    def _write(self, path: Path, fill: Callable[[Memory], None]) -> None:
        """Fill a fresh file through a shared mapping: its pages are the page cache's, so that nothing is in memory twice."""
        if not hasattr(os, "posix_fallocate"):
            raise OSError(errno.ENOTSUP, "this system cannot reserve room for a file")
        with path.open("w+b") as file:
            # Without the blocks of a full disk, writing to a mapping ends the process (SIGBUS) where write would fail.
            os.posix_fallocate(file.fileno(), 0, self.nbytes)
            fill(self._tensors(mmap.mmap(file.fileno(), self.nbytes)))

    def _tensors(self, mapping: mmap.mmap) -> Memory:
        """Views of a mapping, which lives as long as one of them."""
        return {
            slot.name: torch.frombuffer(mapping, dtype=slot.dtype, count=math.prod(slot.shape), offset=offset).view(slot.shape)
            for slot, offset in zip(self.slots, self._offsets, strict=True)
        }

    def _usable(self) -> bool:
        return cache.usable(self.folder, self.intact)
