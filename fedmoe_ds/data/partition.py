"""How samples are dealt to clients, with addressed randomness.

A partition sees only the label of every sample; it never sees text. IID, Dirichlet and quantity partitions cut contiguous
ranges, so the samples are first put in an addressed random order. Every kind deals as flwr-datasets 0.6.1 does from the same
order and seed: runs of before keep their clients. That package itself holds datasets below 5 and rich below 15.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedmoe_ds.config.data_section import PartitionConfig
from fedmoe_ds.data.groups import coded
from fedmoe_ds.data.ragged import Ragged
from fedmoe_ds.distributed.stop_points import stop_point
from fedmoe_ds.errors import UserError
from fedmoe_ds.randomness import address_key, generator

# A Dirichlet partition that leaves a client with too little is drawn again, so often from each of so many seeds.
DIRICHLET_SEEDS = 20
DRAWS_PER_SEED = 11

Rows = NDArray[np.int64]


class Deal(NamedTuple):
    """Clients' names, sorted, and for each the indices of its samples (ascending); every sample is exactly one client's."""

    names: list[str]
    rows: Ragged


def largest_groups(groups: Sequence[str], weights: Sequence[int], clients: int | None, seed: int) -> list[str]:
    """Return the names of the `clients` groups with the largest total weight, sorted; among equals a draw decides."""
    totals: Counter[str] = Counter()
    for group, weight in zip(groups, weights, strict=True):
        totals[group] += weight
    if clients is not None and clients > len(totals):
        raise UserError(
            f"data.partition.clients: {clients}: more than the {len(totals)} groups that the data have; "
            f"use at most {len(totals)} clients or another partition.kind"
        )
    if clients is None or clients == len(totals):
        return sorted(totals)
    # A hash decides among equals, not the name: the alphabet prefers nobody.
    ranked = sorted(totals, key=lambda group: (-totals[group], address_key(seed, "largest-groups", group)))
    return sorted(ranked[:clients])


def deal(labels: Sequence[str], config: PartitionConfig, seed: int) -> Deal:
    """Deal samples to clients.

    `labels[i]` is the group (natural) or the label (dirichlet) of sample i. Raises UserError where the wanted number of
    clients cannot be served.
    """
    if config.kind == "natural":
        names, code_N = coded(labels)
        return Deal(names, Ragged.by_owner(code_N, len(names)))
    clients = _client_count(config, len(labels))
    order = generator(seed, "partition-order").permutation(len(labels))
    owner_N = np.empty(len(labels), np.int64)
    if config.kind == "dirichlet":
        owner_N[order] = _dirichlet(labels, order, config, clients, seed)
    else:
        # Contiguous ranges of the order. A client is a number until the end, so that a million of them are one array.
        sizes = (
            power_law_sizes(len(labels), clients, config.alpha) if config.kind == "quantity" else _equal(len(labels), clients)
        )
        owner_N[order] = np.repeat(np.arange(clients), sizes)
    # Zero-padded names sort as their numbers, and canonical order is that of names.
    width = max(3, len(str(clients - 1)))
    return Deal([f"client-{index:0{width}d}" for index in range(clients)], Ragged.by_owner(owner_N, clients))


def power_law_sizes(samples: int, clients: int, alpha: float) -> Rows:
    """Return client sizes proportional to rank^-alpha: at least one each, summing to `samples`, largest first."""
    assert samples >= clients >= 1
    # One sample each is set aside first; only the others follow the power law.
    share = np.arange(1, clients + 1, dtype=np.float64) ** -alpha
    ideal = share / share.sum() * (samples - clients)
    sizes = np.floor(ideal).astype(np.int64)
    remainder = samples - clients - int(sizes.sum())
    # Largest remainders (Hamilton); stable, so that equal ones go to the larger client on every machine.
    largest_first = np.argsort(-(ideal - sizes), kind="stable")
    sizes[largest_first[:remainder]] += 1
    return np.sort(sizes + 1)[::-1]


def _equal(samples: int, clients: int) -> Rows:
    """Sizes that differ by one at most, the larger ones first."""
    return np.full(clients, samples // clients) + (np.arange(clients) < samples % clients)


def _client_count(config: PartitionConfig, samples: int) -> int:
    if config.clients is None:
        raise UserError(f"data.partition.clients: null: needed for partition.kind={config.kind}; give a number")
    if config.clients > samples:
        raise UserError(
            f"data.partition.clients: {config.clients}: more clients than the {samples} samples to deal; "
            f"use at most {samples} clients or more data"
        )
    if config.kind == "dirichlet" and config.clients * config.min_samples > samples:
        raise UserError(
            f"data.partition.min_samples: {config.min_samples}: {config.clients} clients would need "
            f"{config.clients * config.min_samples} samples and there are {samples}; lower min_samples or clients"
        )
    return config.clients


def _dirichlet(labels: Sequence[str], order: Rows, config: PartitionConfig, clients: int, seed: int) -> Rows:
    """Deal every label's samples by client shares from Dirichlet(alpha), one draw a label (Li et al., arXiv 2102.02079).

    Returns the client of each sample in `order`.
    """
    names, code_N = coded(labels)
    code_N = code_N[order]
    places, counts_L = Ragged.by_owner(code_N, len(names)), np.bincount(code_N)
    for attempt in range(DIRICHLET_SEEDS):
        # A seed's draws come from one generator, as in flwr-datasets; only then follows the next seed.
        draws = np.random.default_rng(address_key(seed, "partition-dirichlet", attempt))
        for _ in range(DRAWS_PER_SEED):
            stop_point()
            share_LC = draws.dirichlet(np.full(clients, config.alpha), size=len(names))
            # Cuts are rounded, not sizes: the pieces of a label always add up to all of it.
            cuts_LC = (np.cumsum(share_LC, axis=1) * counts_L[:, None]).astype(np.int64)
            # Rounding could put the last cut one short of the label's end.
            cuts_LC[:, -1] = counts_L
            sizes_LC = np.diff(cuts_LC, axis=1, prepend=0)
            if sizes_LC.sum(axis=0).min() >= config.min_samples:
                owner_N = np.empty(len(order), np.int64)
                # Label by label, and of each the clients in turn.
                owner_N[places.values_N] = np.repeat(np.tile(np.arange(clients), len(names)), sizes_LC.reshape(-1))
                return owner_N
    raise UserError(
        f"data.partition.alpha: {config.alpha}: no draw gives each of {clients} clients {config.min_samples} of the "
        f"{len(labels)} samples; use a larger alpha, fewer clients or a smaller min_samples"
    )
