"""FL Games by loops over explicit players, in float64: heads w_k, their mean, buffers of past heads, a box.

Legend: N samples of a client, D width of their features, V classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass
class Player:
    """A client: fixed features with a one at their end, labels, its head [V, D + 1], and its past ones, the last first."""

    features_ND: Floats
    labels_N: NDArray[np.int64]
    head_VD: Floats
    past: list[Floats] = field(default_factory=list)

    def gradient(self, head_VD: Floats, chosen: NDArray[np.int64]) -> Floats:
        """Of the mean cross-entropy of some samples."""
        x_ND, y_N = self.features_ND[chosen], self.labels_N[chosen]
        logits_NV = x_ND @ head_VD.T
        p_NV = np.exp(logits_NV - logits_NV.max(1, keepdims=True))
        p_NV /= p_NV.sum(1, keepdims=True)
        p_NV[np.arange(len(y_N)), y_N] -= 1.0
        found: Floats = p_NV.T @ x_ND / len(y_N)
        return found


def play(
    players: Sequence[Player], who: Sequence[int], batches: Sequence[list[NDArray[np.int64]]], rate: float, box: float | None
) -> Floats:
    """One round of the players `who`, each against the others as they were when it began; the mean of all heads."""
    before, buffers = [player.head_VD for player in players], [player.past for player in players]
    for k in who:
        # A buffer that is there counts as one more head of its player.
        terms = [before[q] for q in range(len(players)) if q != k]
        terms += [np.mean(past, axis=0) for q, past in enumerate(buffers) if q != k and past]
        own = before[k]
        for chosen in batches[k]:
            mean = (own + sum(terms)) / (1 + len(terms))
            own = own - rate * players[k].gradient(mean, chosen) / (1 + len(terms))
            own = own if box is None else own.clip(-box, box)
        players[k].head_VD = own
    for player, head, past in zip(players, before, buffers, strict=True):
        player.past = [head, *past][: len(past)]
    found: Floats = np.mean([player.head_VD for player in players], axis=0)
    return found
