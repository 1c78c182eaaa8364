"""FedMoE in plain float64: profiles, the search for a sub-model, its change after similar clients, means over holders.

The search gives the poorest layer one more expert as long as there are slots, where the package looks for theta by bisection.

Legend: L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from reference import Adapters, Task, Trained
from reference_methods import FedIT, Returned
from torch import Tensor

ALL, FOUND, TRIED, KEPT = range(4)
Place = tuple[int, int]


@dataclass
class Known:
    """What the server knows of a client: its p, its sub-model, that before the last change, and how its loss went."""

    scores_LE: np.ndarray
    held: set[Place]
    before: set[Place]
    rounds: int
    phase: int
    lowest: float
    stale: int


class Holders(FedIT):
    """Experts, and rows of routers, are means over those that hold them."""

    def holds(self, one: Returned, layer: int, expert: int) -> bool:
        raise NotImplementedError

    def weight(self, key: str, one: Returned) -> float:
        parts = key.split(".")
        held = parts[2] != "experts" or self.holds(one, int(parts[1]), int(parts[3]))
        return super().weight(key, one) if held else 0.0

    def mean(self, key: str, old: Tensor, returned: list[Returned]) -> Tensor | None:
        parts = key.split(".")
        if parts[2] != "router":
            return super().mean(key, old, returned)
        rows = old.clone()
        for expert in range(len(rows)):
            holders = [one for one in returned if self.holds(one, int(parts[1]), expert)]
            if holders:
                own = [one.task.samples * one.trained.adapters[key][expert] for one in holders]
                rows[expert] = torch.stack(own).sum(0) / sum(one.task.samples for one in holders)
        return rows


class FedMoE(Holders):
    """Options: experts (of every client's tier, per layer), profile, share, least, similar, patience."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.known: dict[int, Known] = {}
        self.plans: dict[int, tuple[int, set[Place], set[Place]]] = {}
        self.phases: set[int] = set()
        self.everything = {(layer, e) for layer in range(self.reference.layers) for e in range(self.reference.experts)}

    def round(self, tasks: list[Task], fresh: Adapters) -> None:
        self.plans = {task.index: self.plan(task.index) for task in tasks}
        self.phases |= {phase for phase, _, _ in self.plans.values()}
        super().round(tasks, fresh)

    def plan(self, index: int) -> tuple[int, set[Place], set[Place]]:
        """Phase, sub-model, and what it goes back to."""
        own = self.known.get(index)
        if own is None or own.rounds < self.options["profile"]:
            return ALL, self.everything, self.everything
        stalled = own.stale >= self.options["patience"]
        if own.phase == ALL:
            found = self.search(index, own.scores_LE)
            return FOUND, found, found
        if own.phase == FOUND and stalled:
            return TRIED, self.changed(index), own.held
        if own.phase == TRIED and stalled:
            return KEPT, own.before, own.before
        return own.phase, own.held, own.before

    def search(self, index: int, p_LE: np.ndarray) -> set[Place]:
        most, least = self._budget(index)
        slots = max(self.reference.layers * least, int(self.options["share"] * most + 1e-9))
        order = [sorted(range(len(row)), key=lambda e: -row[e]) for row in p_LE]
        counts = [least] * self.reference.layers
        covered = [sum(row[e] for e in best[:least]) for row, best in zip(p_LE, order, strict=True)]
        # One more expert for the layer that has least; when the slots end there, no layer can have more than that.
        while sum(counts) < slots:
            poorest = min(range(len(counts)), key=lambda layer: covered[layer])
            if counts[poorest] == self.reference.experts:
                break
            covered[poorest] += p_LE[poorest][order[poorest][counts[poorest]]]
            counts[poorest] += 1
        theta = min(covered)
        self._near(abs(value - theta) for value in covered if value != theta)
        # No layer keeps more than it needs for theta: what that frees goes wherever p is largest.
        for layer, row in enumerate(p_LE):
            while counts[layer] > least and sum(row[e] for e in order[layer][: counts[layer] - 1]) >= theta - 1e-12:
                counts[layer] -= 1
        held = {(layer, e) for layer, count in enumerate(counts) for e in order[layer][:count]}
        return held | set(self._best(self.everything - held, p_LE)[: slots - len(held)])

    def changed(self, index: int) -> set[Place]:
        own, most_least = self.known[index], self._budget(index)
        others = {i: one for i, one in self.known.items() if i != index and one.phase != ALL}
        alike = {i: _cosine(own.scores_LE, one.scores_LE) for i, one in others.items()}
        nearest = sorted(alike, key=lambda i: -alike[i])[: self.options["similar"]]
        if not nearest:
            return own.held
        self._near(abs(alike[i] - alike[j]) for i in alike for j in alike if i < j)
        count = round(sum(len(others[i].held) for i in nearest) / len(nearest) - len(own.held))
        wanted_LE = sum(alike[i] * others[i].scores_LE for i in nearest) / sum(alike[i] for i in nearest)
        if count >= 0:
            more = self._best(self.everything - own.held, wanted_LE)
            return own.held | set(more[: min(count, most_least[0] - len(own.held))])
        held = set(own.held)
        for place in reversed(self._best(own.held, wanted_LE)):
            if count < 0 and sum(layer == place[0] for layer, _ in held) > most_least[1]:
                held.remove(place)
                count += 1
        return held

    def _best(self, places: set[Place], p_LE: np.ndarray) -> list[Place]:
        values = sorted((float(p_LE[place]) for place in places), reverse=True)
        self._near(a - b for a, b in pairwise(values))
        return sorted(places, key=lambda place: -p_LE[place])

    def _budget(self, index: int) -> tuple[int, int]:
        experts = self.options["experts"][index]
        return self.reference.layers * experts, min(self.options["least"], experts)

    def _near(self, margins: Iterable[float]) -> None:
        self.margin = min([self.margin, *margins])

    def local(self, task: Task, received: Adapters) -> Trained:
        phase, held, before = self.plans[task.index]
        self.reference.held = np.zeros((self.reference.layers, self.reference.experts), dtype=bool)
        self.reference.held[tuple(np.array(sorted(held)).T)] = True
        result = super().local(task, received)
        assert self.reference.running is not None
        scores_LE = self.reference.running.scores / result.tokens
        self.notes = {"held": held, "known": self._learnt(task, result, scores_LE, phase, held, before)}
        return result

    def _learnt(
        self, task: Task, result: Trained, scores_LE: np.ndarray, phase: int, held: set[Place], before: set[Place]
    ) -> Known:
        assert len(task.steps) <= 2, "the mean of the first and the last step's loss is that of all"
        old, loss = self.known.get(task.index), result.loss
        lowest = np.inf if old is None or (old.phase, phase) == (ALL, FOUND) else old.lowest
        fell = loss < 0.99 * lowest
        if lowest < np.inf:
            self._near([abs(loss - 0.99 * lowest)])
        stale = 0 if fell else 1 if old is None or old.phase != phase else old.stale + 1
        if fell and phase == TRIED:
            phase, before = FOUND, held
        rounds = 1 if old is None else old.rounds + 1
        return Known(scores_LE, held, before, rounds, phase, loss if fell else lowest, stale)

    def step(self, returned: list[Returned], fresh: Adapters) -> None:
        self.known |= {one.task.index: one.notes["known"] for one in returned}
        super().step(returned, fresh)

    def holds(self, one: Returned, layer: int, expert: int) -> bool:
        return (layer, expert) in one.notes["held"]


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float((one * other).sum() / np.sqrt((one**2).sum() * (other**2).sum()))
