"""Client slots: on which rank the clients of a wave are at home, and which slot of the bank is whose.

Legend: C clients in flight, P ranks of the cluster, H home slots of the rank that has most.

Expert blocks of the bank have one slot per client in flight, on every rank; dense blocks have one per client at home. A rank
that no client of a full wave is at home on therefore holds no dense slot, and no rank holds an expert slot for a home that
stays empty: with one client in flight, P ranks hold one client's adapters between them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from fedmoe_ds.model.upload import upload


def home_of(place: int, ep_size: int) -> tuple[int, int]:
    """(rank, home slot) of the client at this place of a wave.

    Clients are dealt to ranks there and back again, longest first, so that every rank gets a fair part. It does not depend on
    how many there are: a wave that is not full takes the first slots of each rank.
    """
    turn, at = divmod(place, ep_size)
    return (at if turn % 2 == 0 else ep_size - 1 - at), turn


@dataclass(frozen=True)
class ClientSlots:
    """The slots of a cluster of `ep_size` ranks with at most `clients` in flight, numbered by rank and home slot."""

    clients: int
    ep_size: int

    @cached_property
    def at_home(self) -> tuple[int, ...]:
        """Home slots of each rank; they differ by one at most."""
        whole, rest = divmod(self.clients, self.ep_size)
        # Those of the last turn, which only some of the ranks have.
        last = {home_of(whole * self.ep_size + i, self.ep_size)[0] for i in range(rest)}
        return tuple(whole + (rank in last) for rank in range(self.ep_size))

    @property
    def most(self) -> int:
        """H: what every rank makes room for in tensors that ranks exchange."""
        return -(-self.clients // self.ep_size)

    @property
    def full(self) -> bool:
        """Whether every rank has H home slots."""
        return self.most * self.ep_size == self.clients

    def span(self, rank: int) -> slice:
        """The wave slots of the clients at home on a rank."""
        first = sum(self.at_home[:rank])
        return slice(first, first + self.at_home[rank])

    def rank_of(self, wave_slot: int) -> int:
        """The home rank of a wave slot."""
        return _places(self)[wave_slot] // self.most

    def of_wave(self, by_home: Tensor, axis: int = 0) -> Tensor:
        """[..., P x H, ...], by rank and home slot, without the slots that no rank holds: [..., C, ...]."""
        if self.full:
            return by_home
        return by_home.index_select(axis, _places_on(self, by_home.device))


@lru_cache(maxsize=16)
def _places(slots: ClientSlots) -> tuple[int, ...]:
    """Of every wave slot its place in [P x H]."""
    return tuple(rank * slots.most + slot for rank, count in enumerate(slots.at_home) for slot in range(count))


@lru_cache(maxsize=16)
def _places_on(slots: ClientSlots, device: torch.device) -> Tensor:
    # Kept: every layer of every pass asks.
    (places_C,) = upload([np.array(_places(slots), dtype=np.int64)], device)
    return places_C
