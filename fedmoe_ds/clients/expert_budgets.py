"""Expert budgets: which experts a client holds, given what each is worth to it and how many it can hold.

Legend: L layers, E experts of the model, C clients.

All functions are pure, on the CPU and the same on every rank. Where experts are worth the same, the lower index comes first.
"""

from __future__ import annotations

import numpy as np


def best(value_CE: np.ndarray, count_C: np.ndarray) -> np.ndarray:
    """Of each row the `count_C` largest values, bool [C, E]; rows are clients, or layers."""
    rank_CE = np.argsort(np.argsort(-value_CE, axis=1, kind="stable"), axis=1)
    taken_CE: np.ndarray = rank_CE < np.asarray(count_C)[:, None]
    return taken_CE


def add_best(held_LE: np.ndarray, value_LE: np.ndarray, count: int) -> np.ndarray:
    """`held_LE` and the `count` most valuable of the others, wherever they are."""
    # Held ones go behind all others by their key, so that no value can be so small that one of them is counted again.
    order = np.lexsort((-value_LE.ravel(), held_LE.ravel()))
    more = held_LE.ravel().copy()
    more[order[: min(count, int((~held_LE).sum()))]] = True
    return more.reshape(held_LE.shape)


def drop_worst(held_LE: np.ndarray, value_LE: np.ndarray, count: int, least: int) -> np.ndarray:
    """`held_LE` without its `count` least valuable ones, as far as every layer keeps `least`."""
    fewer = held_LE.copy()
    # What is most valuable in its layer is protected first; the order among the others is that of all layers together.
    kept_LE = best(np.where(held_LE, value_LE, -np.inf), np.full(len(held_LE), least))
    free = np.flatnonzero((held_LE & ~kept_LE).ravel())
    # From the last index on, so that of equal ones the lower index stays.
    worst = free[::-1][np.argsort(value_LE.ravel()[free[::-1]], kind="stable")][:count]
    fewer.ravel()[worst] = False
    return fewer


def cover(score_LE: np.ndarray, slots: int, least: int) -> tuple[float, np.ndarray]:
    """(theta, bool [L, E]): the largest theta such that at most `slots` experts in all, and at least `least` in every layer,
    have scores that sum to theta or more in every layer.

    The fewest experts that reach theta in a layer are its best ones, and more of them are needed for a larger theta. So theta
    is one of the sums over a layer's best experts, found among them by binary search. `slots` must be L x `least` or more.
    """
    layers, experts = score_LE.shape
    assert layers * least <= slots and least <= experts, (slots, least, score_LE.shape)
    sums_LE = np.cumsum(-np.sort(-score_LE, axis=1), axis=1)
    # Below the first of these every layer is content with its least; above the last one some layer can never be.
    lowest, highest = float(sums_LE[:, least - 1].min()), float(sums_LE[:, -1].min())
    candidates = np.unique(sums_LE[(sums_LE >= lowest) & (sums_LE <= highest)])
    low, high = 0, len(candidates)  # the first is feasible, and from `high` on none is
    while high - low > 1:
        middle = (low + high) // 2
        fits = _needed(sums_LE, candidates[middle], least).sum() <= slots
        low, high = (middle, high) if fits else (low, middle)
    return float(candidates[low]), best(score_LE, _needed(sums_LE, candidates[low], least))


def _needed(sums_LE: np.ndarray, theta: float, least: int) -> np.ndarray:
    """How many of its best experts each layer needs to reach theta, int64 [L]."""
    count_L: np.ndarray = np.maximum((sums_LE < theta).sum(1) + 1, least)
    return count_L


def scattered(draw_LE: np.ndarray, slots: int, least: int) -> np.ndarray:
    """`slots` experts, at least `least` in every layer, by what was drawn for each: a baseline without scores."""
    held_LE = best(draw_LE, np.full(len(draw_LE), least))
    return add_best(held_LE, draw_LE, slots - int(held_LE.sum()))
