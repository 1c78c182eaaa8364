"""Which samples are held out, by addressed draws: a global hold-out before partitioning, one per client after it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedmoe_ds.errors import UserError
from fedmoe_ds.randomness import generator

Rows = NDArray[np.int64]
_ROUNDING = 1e-9
"""What sums of a stratum's share may be off by."""


def draw_global(strata: Sequence[str], share: float, seed: int) -> Rows:
    """Return the sample indices of the global hold-out, in random order, so that any prefix is representative.

    About `share` of all samples and at least one, spread over the strata by size (`allocate`); every stratum keeps at least
    one sample.
    """
    names, stratum = np.unique(np.asarray(strata), return_inverse=True)
    sizes = np.bincount(stratum, minlength=len(names))
    # Every stratum keeps a sample, so one at least must have two.
    if int((sizes - 1).sum()) == 0:
        raise UserError(
            f"data.global_holdout: {share}: the data have {len(strata)} sample(s) in {len(names)} group(s), so holding "
            "one out would empty a group; give more data or a smaller sequence_length"
        )
    # Of all names for this draw, this one leaves the quickstart's hold-out, and so its digest, as they were without a draw.
    quotas = allocate(sizes, share, generator(seed, "global-holdout-rounding"))
    # One address per stratum: another group in the data does not change what this one holds out.
    drawn = [
        generator(seed, "global-holdout", str(name)).permutation(np.flatnonzero(stratum == index))[: quotas[index]]
        for index, name in enumerate(names)
    ]
    return generator(seed, "global-holdout-order").permutation(np.concatenate(drawn)).astype(np.int64)


def allocate(sizes: Rows, share: float, rng: np.random.Generator) -> Rows:
    """Return how many samples each stratum gives: never a whole stratum, at least one in total.

    Systematic sampling (W. G. Madow, 1949): the fractions of the ideal numbers lie in random order on a line, and marks at
    distance one from a random start round up those that they fall on. So every number is the ideal one rounded up or down,
    their sum is the wanted one, and the expectation of each is the ideal one: nobody is passed over for a name or a size.
    """
    ideal = _ideal(sizes, share)
    # Without the tolerance a sum such as 2.9999999996 would lose a sample to its rounding error.
    quotas = np.floor(ideal + _ROUNDING).astype(np.int64)
    fractions = np.clip(ideal - quotas, 0.0, None)
    missing = round(fractions.sum())
    if missing > 0:
        order = rng.permutation(len(sizes))
        ends = np.cumsum(fractions[order])
        # The last end is scaled to `missing`, so that just as many marks fall on the line.
        marks = np.floor(ends * (missing / ends[-1]) + rng.random())
        quotas[order] += np.diff(marks, prepend=0.0).astype(np.int64)
    return quotas


def _ideal(sizes: Rows, share: float) -> NDArray[np.float64]:
    """The shares of the strata in the hold-out, in samples: by size, but one sample of each stratum stays."""
    room = (sizes - 1).astype(np.float64)
    total = min(max(round(share * int(sizes.sum())), 1), int(room.sum()))
    ideal = np.zeros(len(sizes))
    while True:  # what a full stratum cannot give, the others give
        free = ideal < room
        missing = total - ideal.sum()
        if missing <= _ROUNDING or not free.any():
            return ideal
        ideal[free] += missing * sizes[free] / sizes[free].sum()
        ideal = np.minimum(ideal, room)


def split_client(samples: int, share: float, seed: int, name: str) -> tuple[Rows, Rows]:
    """Return (training indices ascending, hold-out indices in random order) of one client.

    The hold-out has about `share` of the samples, at least one; a client with a single sample keeps it for training.
    """
    # The upper bound comes last: a single sample gives 0.
    held = min(max(round(share * samples), 1), samples - 1)
    order = generator(seed, "client-holdout", name).permutation(samples)
    return np.sort(order[held:]), order[:held]


def cap(samples: int, limit: int | None, seed: int, name: str) -> Rows:
    """Return the indices (ascending) of at most `limit` samples of one client, drawn at random."""
    if limit is None or samples <= limit:
        return np.arange(samples)
    # A prefix of one permutation: a larger limit keeps all that a smaller one had.
    rows: Rows = np.sort(generator(seed, "max-samples", name).permutation(samples)[:limit])
    return rows
