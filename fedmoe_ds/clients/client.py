"""Client: its data sizes and its budget, and how a federation's clients get their tiers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

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
        experts: experts per layer that one of its batches may train.
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

    @property
    def token_rows(self) -> int:
        """Token rows (or images) of one epoch."""
        return self.targets if self.rows is None else self.rows

    @property
    def budget(self) -> Budget:
        return self.top_k, self.rank, self.experts


def make_clients(data: FederatedData, config: FederationConfig, tiers: list[Tier], seed: int) -> list[Client]:
    """All clients of the federation, each with its tier, as names, the data's column, or shares say.

    Raises UserError for a name that no client has, a client that no tier names, and a value of the column that names no tier.
    """
    if any(tier.clients for tier in tiers):
        dealt = _named(data.names, tiers)
    elif data.tiers is not None:
        dealt = _by_column(data.names, data.tiers, config, tiers)
    else:
        dealt = _by_share(len(data.names), config, tiers, seed)
    return [
        Client(
            i,
            name,
            tier.top_k,
            int(data.samples[i]),
            int(data.train_sequences[i]),
            int(data.train_tokens[i]),
            tier.cap,
            tier.rank,
            tier.experts,
            tier=tier.label,
            rows=int(data.train_rows[i]),
        )
        for i, (name, tier) in enumerate(zip(data.names, dealt, strict=True))
    ]


def _by_share(count: int, config: FederationConfig, tiers: list[Tier], seed: int) -> list[Tier]:
    """The tier of every client: shares are exact up to one client, the deal is an addressed draw."""
    bounds = np.cumsum([tier.share for tier in tiers]) / sum(tier.share for tier in tiers)
    order = np.arange(count)
    if config.assignment == "shuffled":
        order = generator(seed, "tiers").permutation(count)
    # Every client stands at the middle of its 1 / count; the minimum catches a last bound that rounding leaves below 1.
    tier_of = np.minimum(np.searchsorted(bounds, (np.arange(count) + 0.5) / count), len(tiers) - 1)
    dealt = dict(zip(order.tolist(), (tiers[t] for t in tier_of), strict=True))
    return [dealt[i] for i in range(count)]


def _named(names: list[str], tiers: list[Tier]) -> list[Tier]:
    place = {name: i for i, tier in enumerate(tiers) for name in tier.clients}
    known = set(names)
    for name, i in place.items():
        if name not in known:
            raise UserError(f"federation.tiers.{i}.clients: {name}: no client has this name{nearest(name, names)}")
    left = [name for name in names if name not in place]
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise UserError(f"federation.tiers: client {left[0]}{more}: in no tier; name every client in one tier's clients")
    return [tiers[place[name]] for name in names]


def _by_column(names: list[str], labels: list[str], config: FederationConfig, tiers: list[Tier]) -> list[Tier]:
    by_label = {tier.label: tier for tier in tiers}
    for name, label in zip(names, labels, strict=True):
        if label not in by_label:
            raise UserError(
                f"federation.tier_column: {config.tier_column}: client {name} has tier '{label}', and the run's tiers are "
                f"{', '.join(by_label)}; mend the data or set federation.tiers"
            )
    return [by_label[label] for label in labels]


def tiers_of(clients: Iterable[Client]) -> dict[str, list[Client]]:
    """The clients of every tier, by its label, the largest budget first."""
    found: dict[str, list[Client]] = {}
    for client in sorted(clients, key=lambda client: client.budget, reverse=True):
        found.setdefault(client.tier, []).append(client)
    return found


def richest(clients: Iterable[Client]) -> Client:
    """The client with the largest budget, the first of them."""
    # -index: among equal budgets the first client, whatever order they come in.
    return max(clients, key=lambda client: (client.budget, -client.index))
