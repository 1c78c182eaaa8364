"""Personal reader: the personal state of single clients in a checkpoint, from however many files, of this or an earlier layout.

Legend: N clients of a file, item the shape of one tensor.

A file has tensors [N, *item] by canonical key and, in `clients`, whose rows these are; of a client that is in several files of
an expert shard the last level counts. A file without `clients` holds all clients of the run: earlier versions wrote those.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedmoe_ds.checkpoint.client_homes import Homes
from fedmoe_ds.checkpoint.personal_files import BEGINNING, FileName
from fedmoe_ds.checkpoint.reader import PERSONAL, damaged, no_such_tensor, tensor_files
from fedmoe_ds.errors import UserError

CLIENTS = "clients"
"""Name of the tensor [N] int64 that says whose rows a file has."""


@dataclass
class OpenFile:
    """One file. `clients`: whose rows it has, None where it has everybody's; `newest`: row by client, where it counts."""

    path: Path
    name: FileName | None
    opened: Any
    keys: frozenset[str]
    clients: list[int] | None
    newest: dict[int, int] = field(default_factory=dict)

    @property
    def shard(self) -> int:
        return -1 if self.name is None else self.name.shard

    def rows(self, clients: int) -> list[int]:
        """Whose row each is; `BEGINNING` where it does not count. `clients`: how many the run has."""
        if self.clients is None:
            return list(range(clients))
        return [client if client in self.newest else BEGINNING for client in self.clients]

    def read(self, key: str, rows: slice) -> Tensor:
        """[rows, *item]."""
        value: Tensor = self.opened.get_slice(key)[rows]
        return value


class PersonalReader:
    """Opens the personal files that a manifest lists.

    Args:
        files: what the manifest lists.
        homes: of a rank that goes on: where its layout wrote the checkpoint, files of other clients and experts stay closed.
    Raises:
        UserError: a file is damaged.
        OSError: one cannot be opened.
    """

    def __init__(self, path: Path, files: Iterable[str], homes: Homes | None = None) -> None:
        self.path, self._stack = path, contextlib.ExitStack()
        parsed = {name: FileName.of(name) for name in tensor_files(files, PERSONAL)}
        if homes is not None and all(name is not None and name.is_of_layout(homes) for name in parsed.values()):
            parsed = {name: found for name, found in parsed.items() if found is not None and _concerns(found, homes)}
        # Levels in order: what comes later is newer. Files of earlier versions are alone.
        ordered = sorted(parsed, key=lambda name: (parsed[name] or FileName(-1, 0, 0, 0, 0, 0), name))
        self.files = [self._open(name, parsed[name]) for name in ordered]
        self.whole = any(file.clients is None for file in self.files)
        # A key lies in the files of one shard, and a client's newest row of it in one of these.
        self._newest: dict[int, dict[int, OpenFile]] = {}
        self._file_of = {key: file for file in self.files for key in file.keys}
        for file in self.files:
            self._newest.setdefault(file.shard, {}).update(dict.fromkeys(file.clients or (), file))
        for file in self.files:
            newest = self._newest[file.shard]
            file.newest = {client: row for row, client in enumerate(file.clients or ()) if newest[client] is file}

    def _open(self, name: str, parsed: FileName | None) -> OpenFile:
        try:
            opened = self._stack.enter_context(safe_open(self.path / name, framework="pt"))
            keys = list(opened.keys())
            clients = opened.get_tensor(CLIENTS) if CLIENTS in keys else None
        except SafetensorError as error:
            raise damaged(self.path / name, error) from None
        if clients is not None and (clients.dim() != 1 or clients.dtype != torch.int64 or len(clients.unique()) < len(clients)):
            raise UserError(f"checkpoint: {self.path / name}: {CLIENTS}: expected numbers of clients; remove this checkpoint")
        numbers = None if clients is None else clients.tolist()
        return OpenFile(self.path / name, parsed, opened, frozenset(keys) - {CLIENTS}, numbers)

    def __enter__(self) -> PersonalReader:
        return self

    def __exit__(self, *details: object) -> None:
        self._stack.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def value(self, key: str, client: int) -> Tensor | None:
        """[*item] of one client; None where it has never been trained. Raises UserError where there is no such tensor."""
        file = self._holder(key, client)
        if file is None:
            return None
        value: Tensor = file.opened.get_slice(key)[client if file.clients is None else file.newest[client]]
        return value

    def beginning(self, key: str) -> Tensor | None:
        """[*item] that everybody begins with; None where everybody is written down."""
        return None if self.whole else self.value(key, BEGINNING)

    def check(self, key: str, item: tuple[int, ...], clients: int) -> None:
        """Raises UserError where a tensor has another shape than this run's, or rows of clients that there are not."""
        self._holder(key, BEGINNING)
        for file in (file for file in self.files if key in file.keys):
            shape = tuple(file.opened.get_slice(key).get_shape())
            count = clients if file.clients is None else len(file.clients)
            if shape != (count, *item):
                raise UserError(f"checkpoint: {key}: shape {shape}, but this run needs {(count, *item)}")
            if not all(BEGINNING <= client < clients for client in file.clients or ()):
                raise UserError(
                    f"checkpoint: {file.path}: {CLIENTS}: numbers that the run's {clients} clients do not have; remove this "
                    "checkpoint"
                )

    def _holder(self, key: str, client: int) -> OpenFile | None:
        if key not in self._file_of:
            raise no_such_tensor(key)
        file = self._file_of[key]
        return file if file.clients is None else self._newest[file.shard].get(client)


def _concerns(name: FileName, homes: Homes) -> bool:
    """Whether a rank reads a file of its own layout: of its clients its own experts, and shard 0's, where all else is; and what
    everybody begins with."""
    return name.shard in (0, homes.shard) and (name.cluster == homes.cluster or name.level == 0)
