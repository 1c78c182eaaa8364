"""Client rows: all that one rank keeps of single clients, one row of float32 for each.

Legend: W numbers of a row, L layers, E experts of this rank, item the shape of one tensor.

A row holds a client's blocks end to end, the dense ones first, so that it is stored, sent and written as one piece. Rows lie in
slabs, in memory up to a limit, beyond it in mapped files that have no name: they go with the process, however it ends, and
their room on the disk is taken when they are made, never in the middle of a write.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedmoe_ds.errors import UserError
from fedmoe_ds.model.adapter_bank import BlockSpec

FP32 = torch.float32.itemsize
PIECE = 1 << 26
"""Bytes of rows that are read, sent or written at once."""
_SLAB, _FILE = 1 << 26, 1 << 30
"""Bytes of one slab in memory, and in a file."""
_NO_LIMIT = 1 << 62


def rows_in(size: int, width: int) -> int:
    """How many rows of so many numbers fit into so many bytes; one at least."""
    return max(1, size // max(FP32 * width, 1))


@dataclass(frozen=True)
class Place:
    """Where one tensor [*item] lies in a row: its canonical key, its block, and the numbers that are its."""

    key: str
    spec: BlockSpec
    numbers: slice


class RowLayout:
    """Where the blocks of a client lie in its row.

    Args:
        specs: the personal blocks.
        experts: number of experts of this rank.

    Attributes:
        specs: by name.
        width: numbers of a row.
        dense: how many of them, at its beginning, are of blocks that have no experts.
    """

    def __init__(self, specs: Iterable[BlockSpec], experts: int) -> None:
        self.specs = {spec.name: spec for spec in specs}
        self.experts, self.width, self.dense = experts, 0, 0
        self._spans, self._shapes = dict[str, slice](), dict[str, tuple[int, ...]]()
        for name, spec in sorted(self.specs.items(), key=lambda pair: pair[1].expert):
            shape = (len(spec.layers), *((experts,) if spec.expert else ()), *spec.item)
            first, self.width = self.width, self.width + math.prod(shape)
            self._spans[name], self._shapes[name] = slice(first, self.width), shape
            self.dense = self.dense if spec.expert else self.width

    def view(self, row_W: Tensor, name: str) -> Tensor:
        """[L, E, *item] or [L, *item]: one block in a row."""
        return row_W[self._spans[name]].view(self._shapes[name])

    def part(self, row_W: Tensor, names: Iterable[str]) -> Tensor:
        """The numbers of some blocks, end to end, a copy."""
        found = [row_W[self._spans[name]] for name in names]
        return torch.cat(found) if found else row_W.new_zeros(0)

    def views_of_part(self, part: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
        """The blocks in what `part` has made."""
        found, first = {}, 0
        for name in names:
            size = math.prod(self._shapes[name])
            found[name] = part[first : first + size].view(self._shapes[name])
            first += size
        return found

    def numbers(self, names: Iterable[str]) -> int:
        return sum(math.prod(self._shapes[name]) for name in names)

    def places(self, first_expert: int, names: Iterable[str] | None = None) -> Iterator[Place]:
        """Every tensor of a row, by layer and global expert id; of the named blocks alone, in what `part` makes of these."""
        chosen = self._spans if names is None else names
        first = 0
        for name in chosen:
            spec, size = self.specs[name], math.prod(self.specs[name].item)
            for layer in spec.layers:
                for key in self._keys(spec, layer, first_expert):
                    yield Place(key, spec, slice(first, first + size))
                    first += size

    def _keys(self, spec: BlockSpec, layer: int, first_expert: int) -> list[str]:
        if not spec.expert:
            return [spec.key(layer)]
        return [spec.key(layer, first_expert + expert) for expert in range(self.experts)]


class Slabs:
    """Where slabs come from.

    Args:
        limit: bytes that may be in memory, of all slabs together.
        folder: gives the folder of the files for what is beyond.
    """

    def __init__(self, limit: int = _NO_LIMIT, folder: Callable[[], Path] = lambda: Path(tempfile.gettempdir())) -> None:
        self.limit, self.folder, self.in_memory = limit, folder, 0

    def rows(self, most: int, width: int) -> int:
        """How many rows the next slab holds, where no more than `most` are needed."""
        return min(most, rows_in(_SLAB if self.in_memory + _SLAB <= self.limit else _FILE, width))

    def take(self, count: int, width: int) -> Tensor:
        """Zeros [count, W]. Raises UserError where the disk has no room."""
        size = count * width * FP32
        if size == 0 or self.in_memory + size <= self.limit:
            self.in_memory += size
            return torch.zeros(count, width)
        return self._mapped(count, width)

    def give_back(self, slab: Tensor) -> None:
        """A slab is not needed any more; who took it drops it."""
        if not _is_mapped(slab):
            self.in_memory -= slab.nbytes

    def _mapped(self, count: int, width: int) -> Tensor:
        folder, size = self.folder(), count * width * FP32
        try:
            folder.mkdir(0o700, parents=True, exist_ok=True)
            # Without a name from the beginning (O_TMPFILE) where the file system can: nothing is left after a kill.
            with tempfile.TemporaryFile(dir=folder) as file:
                # A sparse file would fail at some later write into memory, with a signal and without a reason.
                os.posix_fallocate(file.fileno(), 0, size)
                # The mapping keeps the file; its descriptor is closed, so that many slabs cost none.
                slab = torch.from_file(f"/proc/self/fd/{file.fileno()}", shared=True, size=count * width)
        except (OSError, RuntimeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(
                f"foundation.cache: {folder}: no room for {size / 2**20:.0f} MiB more of what clients keep for themselves: "
                f"{reason}; free space, choose another folder, or raise execution.client_state_gib to keep more in memory"
            ) from None
        return slab.view(count, width)


def _is_mapped(slab: Tensor) -> bool:
    return slab.untyped_storage().filename is not None


class ClientRows:
    """Rows of some clients: made when they are needed, all of them dropped at once.

    Args:
        width: numbers of a row.
    """

    def __init__(self, width: int, slabs: Slabs) -> None:
        self.width, self.slabs = width, slabs
        self._taken: list[Tensor] = []
        # (slab, row) by client, and the first that is free: a tensor object for every row would outweigh a small row.
        self._rows: dict[int, tuple[int, int]] = {}
        self._next, self._room = (0, 0), 0

    def __contains__(self, index: object) -> bool:
        return index in self._rows

    def __iter__(self) -> Iterator[int]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Tensor:
        """[W] of one client, a view."""
        slab, row = self._rows[index]
        return self._taken[slab][row]

    def reserve(self, count: int) -> None:
        """Make room for so many further rows. Raises UserError where there is none."""
        while (missing := count - self._room) > 0:
            slab = self.slabs.take(self.slabs.rows(missing, self.width), self.width)
            self._taken.append(slab)
            self._room += len(slab)

    def add(self, index: int) -> Tensor:
        """[W]: a row for a client that has none, with any content."""
        if not self._room:
            self.reserve(max(1, len(self)))
        slab, row = self._rows[index] = self._next
        self._next = (slab, row + 1) if row + 1 < len(self._taken[slab]) else (slab + 1, 0)
        self._room -= 1
        return self._taken[slab][row]

    def clear(self) -> None:
        """Forget all rows."""
        for slab in self._taken:
            self.slabs.give_back(slab)
        self._taken.clear()
        self._rows.clear()
        self._next, self._room = (0, 0), 0
