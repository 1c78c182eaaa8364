"""FL Games by loops over explicit players, in float64: heads w_k, their mean, buffers of past heads, a box.

Legend: N samples of a client, D width of their features, V classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from reference import Adapters, Task, Trained
from reference_methods import FedIT, Returned, remembered_key

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
    players: Sequence[Player],
    who: Sequence[int],
    batches: Sequence[list[NDArray[np.int64]]],
    rate: float,
    box: float | None,
    smooth: str = "players",
) -> Floats:
    """One round of the players `who`, each against the others as they were when it began; the mean of all heads."""
    before, buffers = [player.head_VD for player in players], [player.past for player in players]
    for k in who:
        rivals = [q for q in range(len(players)) if q != k]
        if smooth == "players":
            terms = [np.mean([before[q], *buffers[q]], axis=0) for q in rivals]
        else:
            terms = [before[q] for q in rivals] + [np.mean(buffers[q], axis=0) for q in rivals]
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


class FLGames(FedIT):
    """Heads of all players and adapters in turn, from gradients that the package saw; options: lr, buffer, box."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        heads = {key: value for key, value in self.adapters.items() if key.startswith("model.head.")}
        self.heads = {index: dict(heads) for index in self.clients}
        self.past = {index: [dict(heads)] * self.options["buffer"] for index in self.clients}
        self.playing = False

    def round(self, tasks: list[Task], fresh: Adapters) -> None:
        self.playing = not self.playing
        super().round(tasks, fresh)

    def local(self, task: Task, received: Adapters) -> Trained:
        frozen = tuple(key for key in received if key.startswith("model.head.") != self.playing)
        return self.reference.train(task, received, self.rescalers[task.index], frozen)

    def step(self, returned: list[Returned], fresh: Adapters) -> None:
        count = len(returned)
        if not self.playing:
            for key, old in self.adapters.items():
                changes = [one.trained.adapters[key] - one.received[key] for one in returned]
                self.adapters[key] = old + sum(changes, torch.zeros_like(old)) / count
            return
        before = self.heads
        self.heads = {one.task.index: self.played(one.task.index) for one in returned}
        for index in self.clients:
            others = [before[other] for other in self.clients if other != index]
            mean = {key: torch.stack([head[key] for head in others]).mean(0) for key in before[index]}
            self.past[index] = [mean, *self.past[index]][: self.options["buffer"]]
        for key in self.heads[self.clients[0]]:
            self.adapters[key] = torch.stack([head[key] for head in self.heads.values()]).mean(0)

    def played(self, index: int) -> Adapters:
        """The client's head after its steps: 1 / N of a gradient of the mean."""
        head, box = dict(self.heads[index]), self.options["box"]
        for slope in self.reference.slopes[index]:
            for key in head:
                head[key] = (head[key] - self.options["lr"] / len(self.clients) * slope[key]).clamp(-box, box)
        return head

    def memory(self, index: int) -> Adapters:
        found = {remembered_key(key, "own"): value for key, value in self.heads[index].items()}
        for age, mean in enumerate(self.past[index]):
            found |= {remembered_key(key, f"others-{age}"): value for key, value in mean.items()}
        return super().memory(index) | found
