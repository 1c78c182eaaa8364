"""Which samples are held out, by addressed draws: a global hold-out before partitioning, one per client after it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedmoe_ds.errors import UserError
from fedmoe_ds.randomness import generator

Rows = NDArray[np.int64]


def draw_global(strata: Sequence[str], share: float, seed: int) -> Rows:
    """Return the sample indices of the global hold-out, in random order, so that any prefix is representative.

    About `share` of all samples and at least one, spread over the strata by size; every stratum keeps at least one
    sample.
    """
    names, stratum = np.unique(np.asarray(strata), return_inverse=True)
    sizes = np.bincount(stratum, minlength=len(names))
    if int((sizes - 1).sum()) == 0:
        raise UserError(
            f"data.global_holdout: {share}: the data have {len(strata)} sample(s) in {len(names)} group(s), so holding "
            "one out would empty a group; give more data or a smaller sequence_length"
        )
    quotas = allocate(sizes, share)
    drawn = [
        generator(seed, "global-holdout", str(name)).permutation(np.flatnonzero(stratum == index))[: quotas[index]]
        for index, name in enumerate(names)
    ]
    return generator(seed, "global-holdout-order").permutation(np.concatenate(drawn)).astype(np.int64)


def allocate(sizes: Rows, share: float) -> Rows:
    """Return how many samples each stratum gives: largest remainders, never a whole stratum, at least one in total."""
    room = sizes - 1
    total = min(max(round(share * int(sizes.sum())), 1), int(room.sum()))
    ideal = total * sizes / sizes.sum()
    quotas: Rows = np.minimum(np.floor(ideal).astype(np.int64), room)
    by_remainder = np.argsort(-(ideal - np.floor(ideal)), kind="stable")
    while (missing := total - int(quotas.sum())) > 0:
        open_strata = [index for index in by_remainder if quotas[index] < room[index]]
        quotas[open_strata[:missing]] += 1
    return quotas


def split_client(samples: int, share: float, seed: int, name: str) -> tuple[Rows, Rows]:
    """Return (training indices ascending, hold-out indices in random order) of one client.

    The hold-out has about `share` of the samples, at least one; a client with a single sample keeps it for training.
    """
    held = min(max(round(share * samples), 1), samples - 1)
    order = generator(seed, "client-holdout", name).permutation(samples)
    return np.sort(order[held:]), order[:held]


def cap(samples: int, limit: int | None, seed: int, name: str) -> Rows:
    """Return the indices (ascending) of at most `limit` samples of one client, drawn at random."""
    if limit is None or samples <= limit:
        return np.arange(samples)
    rows: Rows = np.sort(generator(seed, "max-samples", name).permutation(samples)[:limit])
    return rows
