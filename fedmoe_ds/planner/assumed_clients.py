"""Assumed clients: what stands in for clients whose data are not read, or cannot be: equal ones with full sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedmoe_ds.clients.client import Client, make_clients
from fedmoe_ds.clients.tiers import Tier
from fedmoe_ds.config import Config
from fedmoe_ds.errors import UserError
from fedmoe_ds.planner.lengths import Counts, Data, Lengths

_UNKNOWN_CLIENTS, _UNKNOWN_STEPS = 64, 16
"""What is taken for granted of data that are not read, where the configuration says nothing."""


@dataclass(frozen=True)
class _Federation:
    """Stands in for prepared data: equal clients."""

    names: list[str]
    samples: Counts
    train_sequences: Counts
    train_tokens: Counts
    train_rows: Counts
    tiers: None = None


def assumed_clients(config: Config, folder: Path, tiers: list[Tier]) -> tuple[Sequence[Client], Data]:
    """Equal clients with full sequences. Raises UserError where the configuration leaves their number or size open."""
    named = sorted(name for tier in tiers for name in tier.clients)
    count, local = config.data.partition.clients or len(named) or None, config.local
    if named and count != len(named):
        raise UserError(f"data.partition.clients: {count}: federation.tiers name {len(named)} clients; name each in one tier")
    if (column := config.federation.tier_column) is not None:
        raise UserError(
            f"federation.tier_column: {column}: {folder} holds no tokenizer, so the data are not read; give every tier a share"
        )
    steps = local.steps or local.max_steps
    sequences = config.data.max_samples or (None if steps is None else steps * local.batch_size)
    for key, value in (("data.partition.clients", count), ("local.steps", sequences)):
        if value is None:
            raise UserError(
                f"{key}: not set: {folder} holds no tokenizer, so no tokens can be counted and clients must be assumed; set "
                "data.partition.clients, and local.steps or data.max_samples"
            )
    assert count is not None and sequences is not None
    note = f"assumed: every client has {sequences} sequences of {config.data.sequence_length} tokens (no tokenizer in {folder})"
    if config.data.validation is not None:  # its rows cannot be counted either
        note += ", and data.validation as many as data.global_holdout would draw"
    if "ranked_choice" in config.evaluation.metrics:
        note += "; nor can answers, so the passes of ranked_choice are left out"
    return _equal_clients(config, tiers, named or [f"client-{i}" for i in range(count)], sequences, note)


def uncounted_clients(config: Config, tiers: list[Tier]) -> tuple[Sequence[Client], Data]:
    """What the data would say is taken for granted: how many clients, in which tiers, with how many sequences."""
    local = config.local
    names = sorted(name for tier in tiers for name in tier.clients)
    names = names or [f"client-{i}" for i in range(config.data.partition.clients or _UNKNOWN_CLIENTS)]
    sequences = config.data.max_samples or (local.steps or local.max_steps or _UNKNOWN_STEPS) * local.batch_size
    each = f"{sequences} sequences of {config.data.sequence_length} tokens"
    note = f"assumed: {len(names)} clients with {each} each; the data were not read"
    return _equal_clients(config, tiers, names, sequences, note)


def _equal_clients(
    config: Config, tiers: list[Tier], names: list[str], sequences: int, note: str
) -> tuple[Sequence[Client], Data]:
    """Clients with so many full sequences each."""
    length, each = config.data.sequence_length, np.full(len(names), sequences)
    federation: Any = _Federation(names, each, each, each * length, each * length)
    # One object for all: assumed clients are equal.
    everyone = Lengths.full(sequences, length)
    held_out = max(1, round(len(names) * sequences * config.data.global_holdout))
    own = Lengths.full(config.evaluation.client_sequences, length)
    data = Data(lambda _: everyone, lambda _: own, Lengths.full(held_out, length), note)
    return make_clients(federation, config.federation, tiers, config.seed), data
