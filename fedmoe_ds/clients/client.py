"""Client: its data sizes and its budget; the population of a federation, and how its clients get their tiers.

A population is columns: every rank has all clients, of which a round draws few, and a million objects are 300 MiB and seconds.
Legend: N clients.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, overload

import numpy as np
from numpy.typing import NDArray

from fedmoe_ds.clients.tiers import Budget, Tier
from fedmoe_ds.config import FederationConfig
from fedmoe_ds.data import FederatedData
from fedmoe_ds.errors import UserError, nearest
from fedmoe_ds.randomness import generator


@dataclass(frozen=True)
class Client:
    """One federated client: its data sizes, its budget tier and what the budget buys.

    Attributes:
        targets: what one epoch predicts: next tokens, or classes of images.
        top_k: a FLOPs budget named by the number of active experts that it pays for.
        cap: active experts per token that the client really uses.
        rank: LoRA rank that it trains.
        experts: experts per layer that one of its batches may train, or that it holds.
        layers: layers that it trains, the last ones, where a budget buys them; None: all.
        blocks: further layers that it trains, where a budget buys these.
        used: of its sequences how many it trains on in a round; None: all.
        probed: sequences of its gradient probe before the first step.
        rollouts: forward passes of every row that it trains on, beside those of training: its device makes them, this machine
            does not.
        steps: exact local steps, where they are not derived from the sequences (the pooled client of centralised training).
        rows: token rows (or images) of one epoch, which predict its cost; None: as many as targets.
        tier: what outputs call its tier, see `fedmoe_ds.clients.tiers`; clients of one tier have one budget.
    """

    index: int
    name: str
    top_k: int
    samples: int
    sequences: int
    targets: int
    cap: int = 1
    rank: int = 1
    experts: int = 1
    steps: int | None = None
    tier: str = ""
    rows: int | None = None
    layers: int | None = None
    used: int | None = None
    probed: int = 0
    rollouts: int = 0
    blocks: int | None = None

    @property
    def trained_sequences(self) -> int:
        """Sequences that one epoch of a round goes over."""
        return self.sequences if self.used is None else self.used

    @property
    def token_rows(self) -> int:
        """Token rows (or images) of one epoch."""
        return self.targets if self.rows is None else self.rows

    @property
    def budget(self) -> Budget:
        return self.top_k, self.rank, self.experts, self.layers or 0, self.blocks or 0


Ints = NDArray[np.int64]
Count = Literal["samples", "sequences", "targets", "token_rows", "index"]
"""What of a client is a number: its place among all, or what its data have some of."""


@dataclass(frozen=True)
class _Columns:
    """What is known of all clients of a federation; `tier_N` are places among `tiers`."""

    names: Sequence[str]
    counts: dict[Count, Ints]
    tiers: list[Tier]
    tier_N: Ints


class Population(Sequence[Client]):
    """Clients of a federation, all or some, in canonical order. A `Client` is made where one is asked for."""

    def __init__(self, columns: _Columns, index_N: Ints) -> None:
        self._columns, self._index_N = columns, index_N

    def __len__(self) -> int:
        return len(self._index_N)

    @overload
    def __getitem__(self, place: int) -> Client: ...

    @overload
    def __getitem__(self, place: slice) -> Population: ...

    def __getitem__(self, place: int | slice) -> Client | Population:
        if isinstance(place, slice):
            return Population(self._columns, self._index_N[place])
        index, columns = int(self._index_N[place]), self._columns
        tier, counts = columns.tiers[columns.tier_N[index]], columns.counts
        return Client(
            index,
            columns.names[index],
            tier.top_k,
            int(counts["samples"][index]),
            int(counts["sequences"][index]),
            int(counts["targets"][index]),
            tier.cap,
            tier.rank,
            tier.experts,
            tier=tier.label,
            rows=int(counts["token_rows"][index]),
            layers=tier.layers,
            blocks=tier.blocks,
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def counts_N(self, what: Count) -> Ints:
        """One number of every client."""
        return self._index_N if what == "index" else self._columns.counts[what][self._index_N]

    def top_k_N(self) -> Ints:
        """The top-k of every client."""
        return np.array([tier.top_k for tier in self._columns.tiers], np.int64)[self._columns.tier_N[self._index_N]]

    def tiers_N(self) -> list[Tier]:
        """The tier of every client."""
        tiers = self._columns.tiers
        return [tiers[place] for place in self._columns.tier_N[self._index_N].tolist()]

    def by_tier(self) -> dict[str, Population]:
        """The clients of every tier that has any, by its label, the largest budget first."""
        tier_N, tiers = self._columns.tier_N[self._index_N], self._columns.tiers
        # Tiers of one budget have one label, and are one tier.
        labels = dict.fromkeys(tier.label for tier in sorted(tiers, key=lambda tier: tier.budget, reverse=True))
        places = {label: [place for place, tier in enumerate(tiers) if tier.label == label] for label in labels}
        found = {label: self._index_N[np.isin(tier_N, alike)] for label, alike in places.items()}
        return {label: Population(self._columns, index_N) for label, index_N in found.items() if len(index_N)}


def counts_of(clients: Sequence[Client], what: Count) -> Ints:
    """One number of every client, int64 [N]."""
    if isinstance(clients, Population):
        return clients.counts_N(what)
    return np.array([getattr(client, what) for client in clients], np.int64)


def top_k_of(clients: Sequence[Client]) -> Ints:
    """The top-k of every client, int64 [N]."""
    return clients.top_k_N() if isinstance(clients, Population) else np.array([client.top_k for client in clients], np.int64)


def make_clients(data: FederatedData, config: FederationConfig, tiers: list[Tier], seed: int) -> Population:
    """All clients of the federation, each with its tier, as names, the data's column, or shares say.

    Raises UserError for a name that no client has, a client that no tier names, and a value of the column that names no tier.
    """
    if any(tier.clients for tier in tiers):
        tier_N = _named(data.names, tiers)
    elif data.tiers is not None:
        tier_N = _by_column(data.names, data.tiers, config, tiers)
    else:
        tier_N = _by_share(len(data.names), config, tiers, seed)
    counts: dict[Count, Ints] = {
        "samples": data.samples,
        "sequences": data.train_sequences,
        "targets": data.train_tokens,
        "token_rows": data.train_rows,
    }
    return Population(_Columns(data.names, counts, tiers, tier_N), np.arange(len(data.names)))


def _by_share(count: int, config: FederationConfig, tiers: list[Tier], seed: int) -> Ints:
    """The tier of every client: shares are exact up to one client, the deal is an addressed draw."""
    bounds = np.cumsum([tier.share for tier in tiers]) / sum(tier.share for tier in tiers)
    order = np.arange(count)
    if config.assignment == "shuffled":
        order = generator(seed, "tiers").permutation(count)
    tier_N = np.empty(count, np.int64)
    # Every client stands at the middle of its 1 / count; the minimum catches a last bound that rounding leaves below 1.
    tier_N[order] = np.minimum(np.searchsorted(bounds, (np.arange(count) + 0.5) / count), len(tiers) - 1)
    return tier_N


def _named(names: Sequence[str], tiers: list[Tier]) -> Ints:
    place = {name: i for i, tier in enumerate(tiers) for name in tier.clients}
    known = set(names)
    for name, i in place.items():
        if name not in known:
            raise UserError(f"federation.tiers.{i}.clients: {name}: no client has this name{nearest(name, names)}")
    left = [name for name in names if name not in place]
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise UserError(f"federation.tiers: client {left[0]}{more}: in no tier; name every client in one tier's clients")
    return np.array([place[name] for name in names], np.int64)


def _by_column(names: Sequence[str], labels: list[str], config: FederationConfig, tiers: list[Tier]) -> Ints:
    # The last of equal labels: their budgets are equal, too.
    place = {tier.label: i for i, tier in enumerate(tiers)}
    for name, label in zip(names, labels, strict=True):
        if label not in place:
            raise UserError(
                f"federation.tier_column: {config.tier_column}: client {name} has tier '{label}', and the run's tiers are "
                f"{', '.join(place)}; mend the data or set federation.tiers"
            )
    return np.array([place[label] for label in labels], np.int64)


def tiers_of(clients: Iterable[Client]) -> Mapping[str, Sequence[Client]]:
    """The clients of every tier, by its label, the largest budget first."""
    if isinstance(clients, Population):
        return clients.by_tier()
    found: dict[str, list[Client]] = {}
    for client in sorted(clients, key=lambda client: client.budget, reverse=True):
        found.setdefault(client.tier, []).append(client)
    return found


def richest(clients: Iterable[Client]) -> Client:
    """The client with the largest budget, the first of them."""
    if isinstance(clients, Population):
        return next(iter(clients.by_tier().values()))[0]
    # -index: among equal budgets the first client, whatever order they come in.
    return max(clients, key=lambda client: (client.budget, -client.index))
