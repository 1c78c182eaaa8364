"""Weight stream: the tensors of a model folder as its files hold them, block by block, so that none is ever in memory whole.

A block is some leading rows of a tensor, under the tensor's own name, in its own type: whoever goes through a model of any size
(an export) needs memory for one block of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from fedmoe_ds.distributed.stop_points import stop_point
from fedmoe_ds.errors import UserError
from fedmoe_ds.foundation.meta_model import first_line
from fedmoe_ds.foundation.tensor_names import present_name
from fedmoe_ds.foundation.weight_files import BYTES_PER_OPEN, WeightFiles, open_weights

BLOCK_BYTES = 2**20
"""Of a block, where one row is not larger: a block and what is computed of it then stay in a processor's cache."""
_ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""Names of types in safetensors files; a model with others (float8) is quantised, and was refused when it was read."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a weight file.

    Attributes:
        name: as the file has it.
        present: as the model of transformers 5 has it.
        shape: as stored.
        dtype: safetensors' name of its type.
        path: its file.
    """

    name: str
    present: str
    shape: tuple[int, ...]
    dtype: str
    path: Path

    @property
    def item_bytes(self) -> int:
        """Of one number."""
        return _ITEM_BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Of all of it."""
        return math.prod(self.shape) * self.item_bytes

    def blocks(self) -> Iterator[slice]:
        """All of its rows, in blocks; one block for a tensor without axes."""
        return row_blocks(self.shape, self.item_bytes) if self.shape else iter([slice(None)])


def row_blocks(shape: tuple[int, ...], item_bytes: int) -> Iterator[slice]:
    """All leading rows of a tensor of this shape, as many at a time as `BLOCK_BYTES` hold."""
    step = max(1, BLOCK_BYTES // max(math.prod(shape[1:]) * item_bytes, 1))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


class WeightStream:
    """Blocks of the tensors of a folder, for one reader that goes through them file by file.

    Attributes:
        tensors: all of them, in the order of files, and of names within a file.
    """

    def __init__(self, files: WeightFiles) -> None:
        """Raises UserError: a file is damaged, or a tensor has a type that is not known."""
        self._path: Path | None = None
        self._file: Any = None
        self._read = 0
        self.tensors = [tensor for path in files.paths for tensor in self._listed(path, files)]

    def block(self, tensor: StoredTensor, rows: slice) -> Tensor:
        """Some leading rows as they are stored; valid until the next call, and not to be written to.

        Raises UserError: the file cannot be read.
        """
        stop_point()
        if tensor.path != self._path or self._read >= BYTES_PER_OPEN:
            self._open(tensor.path)
        try:
            part: Tensor = self._file.get_slice(tensor.name)[rows] if tensor.shape else self._file.get_tensor(tensor.name)
        except SafetensorError as error:
            raise UserError(
                f"foundation.path: {tensor.path}: tensor '{tensor.name}' cannot be read: {first_line(error)}; get it again"
            ) from error
        self._read += part.nbytes
        return part

    def _listed(self, path: Path, files: WeightFiles) -> Iterator[StoredTensor]:
        self._open(path)
        for name in sorted(self._file.keys()):
            # An index may leave out what its files have: then it is no part of the model.
            if files.where.get(present_name(name)) != (path, name):
                continue
            part = self._file.get_slice(name)
            if part.get_dtype() not in _ITEM_BYTES:
                raise UserError(
                    f"foundation.path: {path}: tensor '{name}' is {part.get_dtype()}; give weights that are not quantised"
                )
            yield StoredTensor(name, present_name(name), tuple(part.get_shape()), part.get_dtype(), path)

    def _open(self, path: Path) -> None:
        self._file = open_weights(path)
        self._path, self._read = path, 0
