"""Which samples are held out, by addressed draws: a global hold-out and a public split before partitioning, one hold-out per
client after it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedmoe_ds.data.groups import coded
from fedmoe_ds.data.progress import counted
from fedmoe_ds.data.ragged import Ragged
from fedmoe_ds.distributed.stop_points import stop_point
from fedmoe_ds.errors import UserError
from fedmoe_ds.randomness import generator, generators

Rows = NDArray[np.int64]
_ROUNDING = 1e-9
"""What sums of a stratum's share may be off by."""


def draw_global(strata: Sequence[str], share: float, seed: int) -> Rows:
    """Return the sample indices of the global hold-out, in random order, so that any prefix is representative.

    About `share` of all samples and at least one, spread over the strata by size (`allocate`); every stratum keeps at least
    one sample.
    """
    names, stratum_N = coded(strata)
    members = Ragged.by_owner(stratum_N, len(names))
    sizes = members.sizes_P
    # Every stratum keeps a sample, so one at least must have two.
    if int((sizes - 1).sum()) == 0:
        raise UserError(
            f"data.global_holdout: {share}: the data have {len(strata)} sample(s) in {len(names)} group(s), so holding "
            "one out would empty a group; give more data or a smaller sequence_length"
        )
    # Of all names for this draw, this one leaves the quickstart's hold-out, and so its digest, as they were without a draw.
    quotas = allocate(sizes, share, generator(seed, "global-holdout-rounding"))
    return _drawn(names, members, quotas, seed, "global-holdout")


def draw_public(strata: Sequence[str], share: float, seed: int) -> Rows:
    """Return the sample indices that the server alone trains on, ascending; none with a share of 0.

    They are spread over the strata as the global hold-out is, and every stratum keeps a sample for its clients.
    """
    if share == 0:
        return np.empty(0, np.int64)
    names, stratum_N = coded(strata)
    members = Ragged.by_owner(stratum_N, len(names))
    if int((members.sizes_P - 1).sum()) == 0:
        raise UserError(
            f"data.public: {share}: {len(strata)} sample(s) in {len(names)} group(s) are left for it, so giving one to the "
            "server would empty a group; give more data, or drop the key"
        )
    quotas = allocate(members.sizes_P, share, generator(seed, "public-rounding"))
    return np.sort(_drawn(names, members, quotas, seed, "public"))


def _drawn(names: Sequence[str], members: Ragged, quotas: Rows, seed: int, what: str) -> Rows:
    """As many members of every stratum as its quota says, in random order."""
    # Of a million strata few give anything: the others need no draw.
    giving = np.flatnonzero(quotas)
    # One address per stratum: another group in the data does not change what this one holds out.
    draws = generators(seed, what, (names[index] for index in giving.tolist()))
    given = zip(draws, members.spans(giving), quotas[giving].tolist(), strict=True)
    drawn = [draw.permutation(members.values_N[start:end])[:quota] for draw, (start, end), quota in given]
    return generator(seed, f"{what}-order").permutation(np.concatenate(drawn)).astype(np.int64)


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


def split_clients(rows: Ragged, share: float, seed: int, names: Sequence[str]) -> Ragged:
    """Return two parts per client of `rows`: what it trains on, in its order there, and its hold-out in random order.

    The hold-out has about `share` of the client's samples, at least one; a client with a single sample keeps it for training.
    """
    sizes_C = rows.sizes_P
    # The upper bound comes last: a single sample gives 0.
    held_C = np.minimum(np.maximum(np.rint(share * sizes_C).astype(np.int64), 1), sizes_C - 1)
    drawn_N = rows.place_N
    several = np.flatnonzero(sizes_C > 1)
    draws = generators(seed, "client-holdout", (names[client] for client in several.tolist()))
    for draw, (start, end) in counted(zip(draws, rows.spans(several), strict=True), len(several), "hold-outs drawn"):
        stop_point()
        drawn_N[start:end] = draw.permutation(end - start)
    client_N, turn_N = rows.owner_N, rows.place_N
    held_N = turn_N < held_C[client_N]
    # The first of a client's drawn order are held, in that order; the others go back to their places.
    order = np.lexsort((np.where(held_N, turn_N, drawn_N), held_N, client_N))
    chosen_N = (rows.bounds[:-1][client_N] + drawn_N)[order]
    return Ragged.of(rows.values_N[chosen_N], np.stack([sizes_C - held_C, held_C], axis=1).reshape(-1))


def cap_clients(rows: Ragged, limit: int | None, seed: int, names: Sequence[str]) -> Ragged:
    """Return at most `limit` samples of each client, drawn at random, in their order."""
    sizes_C = rows.sizes_P
    beyond = np.flatnonzero(sizes_C > limit) if limit is not None else np.empty(0, np.int64)
    if limit is None or not len(beyond):
        return rows
    kept_N = np.ones(len(rows.values_N), dtype=bool)
    draws = generators(seed, "max-samples", (names[client] for client in beyond.tolist()))
    for draw, (start, end) in counted(zip(draws, rows.spans(beyond), strict=True), len(beyond), "clients cut to max_samples"):
        stop_point()
        # A prefix of one permutation: a larger limit keeps all that a smaller one had.
        kept_N[start + draw.permutation(end - start)[limit:]] = False
    return Ragged.of(rows.values_N[kept_N], np.minimum(sizes_C, limit))
