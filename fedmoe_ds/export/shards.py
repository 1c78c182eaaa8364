"""Shards: safetensors files with an index, written block by block.

The library writes files out of tensors that are all in memory. A shard of 5 GB would need as much, so the format is written
here: 8 bytes of length (little endian), a JSON header that says where every tensor begins and ends, and the tensors one after
the other. Source: the safetensors README, section Format.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from fedmoe_ds.foundation.weight_files import INDEX_FILE, WEIGHTS_FILE
from fedmoe_ds.foundation.weight_stream import StoredTensor
from fedmoe_ds.storage.files import sync

LARGEST = 5 * 10**9
"""Bytes of a shard, as transformers has it; a larger tensor has a shard to itself."""
_ALIGNMENT = 8

Blocks = Callable[[StoredTensor], Iterable[Tensor]]
"""The content of a tensor, block by block, in the order of its rows."""


def write_shards(folder: Path, tensors: list[StoredTensor], content: Blocks) -> list[Path]:
    """Write all tensors under their names and types into files of at most `LARGEST` bytes, with an index if there are several.

    Args:
        folder: where they go; none of the files is there yet.
        tensors: in the order in which they are to be read.
        content: gives blocks of the type and shape that the tensor has.
    Returns:
        The files, the index last.
    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    groups = _grouped(tensors, LARGEST)
    paths = [folder / _name(number, len(groups)) for number in range(1, len(groups) + 1)]
    for path, group in zip(paths, groups, strict=True):
        write_tensors(path, group, content)
    if len(groups) == 1:
        return paths
    where = {tensor.name: path.name for path, group in zip(paths, groups, strict=True) for tensor in group}
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)}, "weight_map": where}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=1), encoding="utf-8")
    return [*paths, folder / INDEX_FILE]


def _name(number: int, count: int) -> str:
    return WEIGHTS_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _grouped(tensors: list[StoredTensor], largest: int) -> list[list[StoredTensor]]:
    """Cut into runs of at most so many bytes."""
    groups: list[list[StoredTensor]] = []
    size = 0
    for tensor in tensors:
        if not groups or size + tensor.nbytes > largest:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    return groups


def write_tensors(path: Path, tensors: list[StoredTensor], content: Blocks) -> None:
    """Write one file, which is not there yet, and bring it to the disk. Raises OSError."""
    with path.open("xb") as file:
        _write(file, tensors, content)
    sync(path)


def _write(file: BinaryIO, group: list[StoredTensor], content: Blocks) -> None:
    # Wide types first, as the library has it: every tensor then begins at a multiple of its numbers' size. Stable, so that
    # tensors of one type keep the order in which they are read.
    ordered = sorted(group, key=lambda tensor: -tensor.item_bytes)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in ordered:
        left = tensor.nbytes
        for block in content(tensor):
            left -= block.nbytes
            # A bfloat16 tensor has no NumPy type; its bytes have one.
            file.write(block.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        assert left == 0, (tensor, left)
