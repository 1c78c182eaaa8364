"""Personal state: what belongs to single clients and outlives a round.

Legend: L layers, E experts of this rank, item the shape of one tensor, W numbers of a client's row.

Scalars (rescalers, ranks), control variates, and for personalised methods whole adapters. A client's row lies in the cluster
where it is at home (`client_homes`); a round brings it to the cluster that trains the client, and what that has made of it
goes home when the round ends. A client that has never been trained has no row anywhere: it has what everybody begins with. So
a rank holds the rows of clients / clusters at most, and those of the round's clients that it trains.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fedmoe_ds.checkpoint.client_homes import Homes, Move
from fedmoe_ds.checkpoint.client_mean import ClientMean
from fedmoe_ds.checkpoint.client_rows import FP32, PIECE, ClientRows, Place, RowLayout, Slabs, rows_in
from fedmoe_ds.checkpoint.personal_files import BEGINNING, Plan, SavedFiles
from fedmoe_ds.checkpoint.personal_reader import CLIENTS, OpenFile, PersonalReader
from fedmoe_ds.distributed import open_files
from fedmoe_ds.distributed.control import Control
from fedmoe_ds.distributed.runtime import Runtime
from fedmoe_ds.errors import UserError
from fedmoe_ds.model.adapter_bank import BlockSpec

_MOST = 4096
"""Clients whose rows are gathered at once, however small these are."""


class Personal:
    """The personal state of all clients, as one rank sees it.

    Args:
        specs: the personal blocks.
        experts: number of experts of this rank.
        clients: number of clients of the federation.
        common: the value of a block that everybody begins with, broadcastable to [L, E, *item] or [L, *item].
        initial: (block, client index) -> the number that this client begins with instead, everywhere in the block, or None.
        homes: who keeps whom.
        slabs: the memory of it.
    """

    def __init__(
        self,
        specs: Iterable[BlockSpec],
        experts: int,
        clients: int,
        common: Callable[[BlockSpec], Tensor | float] = lambda spec: 0.0,
        initial: Callable[[BlockSpec, int], float | None] = lambda spec, index: None,
        homes: Homes | None = None,
        slabs: Slabs | None = None,
    ) -> None:
        self.layout = RowLayout(specs, experts)
        self.specs, self.clients, self.initial = self.layout.specs, clients, initial
        self.homes, slabs = homes or Homes(), slabs or Slabs()
        self.first_expert = self.homes.shard * experts
        self._common_W = torch.zeros(self.layout.width)
        for name, spec in self.specs.items():
            self.layout.view(self._common_W, name).copy_(torch.as_tensor(common(spec)))
        # What checkpoints are written from changes in `share` alone: a round in training keeps its results among the guests.
        self._home, self._guests = ClientRows(self.layout.width, slabs), ClientRows(self.layout.width, slabs)
        self._trained, self._at_home = set[int](), set[int]()
        self._known = set[int]()
        self.files = SavedFiles(self.homes)
        # Not a row: every rank has them all (`memories.py`).
        self.memories = dict[int, dict[str, np.ndarray]]()

    def __bool__(self) -> bool:
        return bool(self.specs)

    def state(self, index: int) -> dict[str, Tensor]:
        """One client's blocks, [L, E, *item] or [L, *item], to be read: of one in training here, or at home here."""
        row_W = self._row(index)
        return {name: self.layout.view(row_W, name) for name in self.specs}

    def dense(self, index: int) -> dict[str, Tensor]:
        """Those without experts."""
        row_W = self._row(index)
        return {name: self.layout.view(row_W, name) for name, spec in self.specs.items() if not spec.expert}

    def _row(self, index: int) -> Tensor:
        for rows in (self._guests, self._home):
            if index in rows:
                return rows[index]
        assert index not in self._known, f"client {index} is at home elsewhere, and has not been fetched"
        return self._beginning(index)

    def _beginning(self, index: int) -> Tensor:
        """[W]: what a client has before it is trained; to be read."""
        own = {name: self.initial(spec, index) for name, spec in self.specs.items()}
        if all(number is None for number in own.values()):
            return self._common_W
        row_W = self._common_W.clone()
        for name, number in own.items():
            if number is not None:
                self.layout.view(row_W, name).fill_(number)
        return row_W

    def begins_as_all(self, index: int, names: Iterable[str]) -> bool:
        """Whether a client has, of these blocks, what everybody begins with; every rank knows that."""
        return index not in self._known and all(self.initial(self.specs[name], index) is None for name in names)

    def allow_peers(self, runtime: Runtime) -> None:
        """Let this process connect with all clusters. Collective. Raises UserError where the host does not allow that."""
        launch, device = runtime.launch, self.homes.device.type
        if self and self.homes.clusters > 1:
            needed = open_files.needed_for_rows(launch, self.homes.shards, device)
            open_files.refuse(runtime.gather(astuple(open_files.allow(needed))))

    # A round

    def fetch(self, wanted: Sequence[Iterable[int]], runtime: Runtime) -> None:
        """Bring the rows of a round's clients to the clusters that train them; `wanted` has theirs by cluster. Collective.

        Raises:
            UserError: a rank has no room for them, or for what they become at home.
        """
        if not self:
            return
        self._guests.clear()
        mine = set(wanted[self.homes.cluster])
        new = {i for one in wanted for i in one if self.homes.is_here(i) and i not in self._home}

        def reserve() -> None:
            self._guests.reserve(len(mine))
            self._home.reserve(len(new))

        runtime.run_on_all_ranks(reserve)
        away = [(i, cluster) for cluster, clients in enumerate(wanted) for i in clients if self.homes.home(i) != cluster]
        moves = [Move(i, self.homes.home(i), cluster) for i, cluster in sorted(away) if i in self._known]
        self.homes.move(moves, self.layout.width, self._home.__getitem__, self._arrive)

    def _arrive(self, index: int, row_W: Tensor) -> None:
        self._guest(index).copy_(row_W)

    def _guest(self, index: int) -> Tensor:
        """[W] of a client in training, made of what is known of it."""
        if index in self._guests:
            return self._guests[index]
        before_W = self._home[index] if index in self._home else self._beginning(index)
        return self._guests.add(index).copy_(before_W)

    def store(self, index: int, name: str, value: Tensor) -> None:
        """Keep a trained client's new value; `share` brings it home."""
        # Adding zero turns -0.0 into 0.0: earlier versions did, and the digest counts bits.
        self.layout.view(self._guest(index), name).copy_(value.cpu() + 0.0)
        self._trained.add(index)
        if not self.specs[name].expert:
            self._at_home.add(index)

    def share(self, runtime: Runtime, control: Control) -> None:
        """Bring home what was stored since the last call, of clients that one cluster each has trained. Collective.

        Args:
            control: of this cluster.
        """
        if not self:
            return
        told = runtime.gather([sorted(self._trained), sorted(self._at_home)])
        shards = self.homes.shards
        first = self.homes.cluster * shards
        self._spread_dense(control, [at_home for _, at_home in told[first : first + shards]])
        trained = {index: rank // shards for rank, (theirs, _) in enumerate(told) for index in theirs}
        moves = []
        for index, cluster in sorted(trained.items()):
            if self.homes.home(index) != cluster:
                moves.append(Move(index, cluster, self.homes.home(index)))
            elif cluster == self.homes.cluster:
                self._settle(index, self._guest(index))
        self.homes.move(moves, self.layout.width, self._guest, self._settle)
        self._known |= trained.keys()
        self._guests.clear()
        self._trained, self._at_home = set(), set()

    def _spread_dense(self, control: Control, theirs: list[list[int]]) -> None:
        """Dense blocks are stored where a client is trained; all ranks of the cluster get them. `theirs`: clients by rank."""
        width, most = self.layout.dense, max(map(len, theirs))
        if control.size == 1 or not width:
            return
        # Every rank gives as many, and all of them are received.
        step = rows_in(PIECE, width * control.size)
        for start in range(0, most, step):
            mine = [self._guests[index][:width] for index in theirs[control.rank][start : start + step]]
            payload = torch.stack(mine).numpy().tobytes() if mine else b""
            for clients, content in zip(theirs, control.gather(payload), strict=True):
                for place, index in enumerate(clients[start : start + step]):
                    found = torch.frombuffer(bytearray(content), dtype=torch.float32, count=width, offset=place * width * FP32)
                    self._guest(index)[:width].copy_(found)

    def _settle(self, index: int, row_W: Tensor) -> None:
        (self._home[index] if index in self._home else self._home.add(index)).copy_(row_W)
        self.files.changed.add(index)

    # All ranks at once

    def agree(self, runtime: Runtime) -> None:
        """Let every rank know who has a row somewhere, after a checkpoint was read. Collective."""
        if self:
            self._known = {index for theirs in runtime.gather(sorted(self._home)) for index in theirs}

    def visit(self, indices: Iterable[int], names: Sequence[str]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """(client, its blocks of these names) one after the other, on every rank, to be read. Collective: all ranks go through
        the same clients to the end."""
        for clients, rows in self._gathered(indices, names):
            for index in clients:
                if index in rows:
                    yield index, self.layout.views_of_part(rows[index], names)
                else:
                    row_W = self._row(index)
                    yield index, {name: self.layout.view(row_W, name) for name in names}

    def _gathered(
        self, indices: Iterable[int], names: Sequence[str], target: int | None = None
    ) -> Iterator[tuple[list[int], dict[int, Tensor]]]:
        """Clients piece by piece, and what `RowLayout.part` makes of rows that may be elsewhere; with `target` these reach that
        cluster alone."""
        everyone, width = list(indices), self.layout.numbers(names)
        step = min(_MOST, rows_in(PIECE, width))
        for start in range(0, len(everyone), step):
            clients = everyone[start : start + step]
            # In a world of one cluster all rows are read where they are.
            known = [index for index in clients if index in self._known] if self.homes.clusters > 1 else []
            yield clients, self.homes.collect(known, width, lambda i: self.layout.part(self._home[i], names), target)

    def means(self, indices: Sequence[int], names: Sequence[str]) -> dict[str, Tensor]:
        """The mean of blocks over clients, float64. Collective."""
        own = {name: {i: self.initial(self.specs[name], i) for i in indices if i not in self._known} for name in names}
        untouched = {name: sum(number is None for number in numbers.values()) for name, numbers in own.items()}
        means = {name: ClientMean(self.layout.view(self._common_W, name), untouched[name]) for name in names}
        asked = [i for i in indices if i in self._known or any(own[name][i] is not None for name in names)]
        for index, blocks in self.visit(asked, names):
            for name, value in blocks.items():
                if index in self._known or own[name][index] is not None:
                    means[name].add(value)
        return {name: mean.value for name, mean in means.items()}

    def hashes(self, names: Sequence[str]) -> dict[str, str]:
        """sha256 of [N clients, *item] by canonical key, as `digest` hashes tensors, for the experts of this rank. Collective.

        Only the first cluster hashes, and only it receives rows: a sum over all clients in their order cannot be made in parts.
        """
        places = list(self.layout.places(self.first_expert, names))
        hashers = [hashlib.sha256(str((self.clients, *place.spec.item)).encode()) for place in places]
        for clients, rows in self._gathered(range(self.clients), names, target=0):
            if self.homes.cluster > 0:
                continue
            parts_NW = torch.stack([rows[i] if i in rows else self.layout.part(self._row(i), names) for i in clients])
            for place, hasher in zip(places, hashers, strict=True):
                hasher.update(parts_NW[:, place.numbers].contiguous().numpy().tobytes())
        return {} if self.homes.cluster else {p.key: h.hexdigest() for p, h in zip(places, hashers, strict=True)}

    # Checkpoints

    def to_write(self) -> tuple[dict[str, Callable[[], dict[str, Tensor]]], Plan]:
        """This rank's files of the next checkpoint, by name: what makes their tensors, at any time before the next `share`."""
        # Of blocks without experts the first shard speaks for all.
        if not self or (self.homes.shard > 0 and self.layout.dense == self.layout.width):
            return {}, Plan({}, [], None)
        plan = self.files.plan(rows_in(PIECE, self.layout.width))
        return {name: partial(self._written, clients) for name, clients in plan.write.items()}, plan

    def _written(self, clients: Sequence[int]) -> dict[str, Tensor]:
        """[N, *item] by canonical key, and whose rows they are."""
        rows_NW = torch.stack([self._common_W if index == BEGINNING else self._home[index] for index in clients])
        found = {CLIENTS: torch.tensor(clients, dtype=torch.int64)}
        for place in self.layout.places(self.first_expert):
            if place.spec.expert or self.homes.shard == 0:
                found[place.key] = rows_NW[:, place.numbers].reshape(len(clients), *place.spec.item).contiguous()
        return found

    def restore(self, reader: PersonalReader) -> None:
        """Take what a checkpoint holds of the clients that are at home here.

        Raises:
            UserError: it is of another run, lacks a part of a client, or there is no room for it.
        """
        places = list(self.layout.places(self.first_expert))
        for place in places:
            reader.check(place.key, place.spec.item, self.clients)
            if (value := reader.beginning(place.key)) is not None:
                self._common_W[place.numbers] = value.flatten()
        self._home.clear()
        filled = Counter[int]()
        for file in reader.files:
            for client, numbers, values in self._rows_of(file, [place for place in places if place.key in file.keys]):
                (self._home[client] if client in self._home else self._home.add(client))[numbers] = values
                filled[client] += len(numbers)
        if lacking := [client for client, count in filled.items() if count != self.layout.width]:
            raise UserError(f"checkpoint: {reader.path}: lacks a part of client {min(lacking)}; remove this checkpoint")
        self._known = set(self._home)
        held = [(file.name, len(file.clients), {*file.newest}) for file in reader.files if file.name and file.clients]
        self.files.take(reader.path, [] if reader.whole else held, self._home)

    def _rows_of(self, file: OpenFile, places: list[Place]) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(client at home here, which numbers of its row, these) of a file's rows that count."""
        clients, step = file.rows(self.clients), rows_in(PIECE, self.layout.width)
        mine = [client != BEGINNING and self.homes.is_here(client) for client in clients]
        if not places or not any(mine):
            return
        self._home.reserve(sum(here and client not in self._home for here, client in zip(mine, clients, strict=True)))
        numbers = torch.cat([torch.arange(place.numbers.start, place.numbers.stop) for place in places])
        for start in range(0, len(clients), step):
            rows = slice(start, min(start + step, len(clients)))
            values = torch.cat([file.read(place.key, rows).flatten(1) for place in places], 1)
            yield from ((c, numbers, v) for c, here, v in zip(clients[rows], mine[rows], values, strict=True) if here)
