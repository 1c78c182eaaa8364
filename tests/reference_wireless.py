"""The two wireless systems in plain float64: a linear program in the place of the greedy weights, subsets one by one in that of
the sorted choice, every client's queue updated in every round.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from reference import Adapters, Task
from reference_methods import FedIT, Returned
from scipy.optimize import linprog
from torch import Tensor

from fedmoe_ds.randomness import generator


def fading(seed: int, round_index: int, client: int) -> float:
    """|z|^2 of Rayleigh's z."""
    return float(generator(seed, "fading", round_index, client).standard_exponential())


class OverTheAir(FedIT):
    """Chebyshev weights and noise on the mean; options: seed, epsilon, snr_db."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.losses: dict[int, float] = {}
        self.number = 0

    def round(self, tasks: list[Task], fresh: Adapters) -> None:
        self.number += 1
        self.lambdas = self._weights(tasks)
        super().round(tasks, fresh)

    def _weights(self, tasks: list[Task]) -> dict[int, float]:
        shares = [task.samples / sum(other.samples for other in tasks) for task in tasks]
        known = [self.losses[task.index] for task in tasks if task.index in self.losses]
        if not known:
            return {task.index: share for task, share in zip(tasks, shares, strict=True)}
        losses = [self.losses.get(task.index, sum(known) / len(known)) for task in tasks]
        for first, second in itertools.combinations(losses, 2):
            self.margin = min(self.margin, abs(first - second) if first != second else math.inf)
        epsilon = self.options["epsilon"]
        box = [(max(p - epsilon, 0.0), min(p + epsilon, 1.0)) for p in shares]
        found = linprog([-loss for loss in losses], A_eq=[[1.0] * len(tasks)], b_eq=[1.0], bounds=box).x
        return {task.index: float(weight) for task, weight in zip(tasks, found, strict=True)}

    def weight(self, key: str, one: Returned) -> float:
        return self.lambdas[one.task.index]

    def step(self, returned: list[Returned], fresh: Adapters) -> None:
        seed, loudness = self.options["seed"], []
        for one in returned:
            self.losses[one.task.index] = one.trained.first_loss
            sent = [one.trained.adapters[key] - one.received[key] for key in self.adapters]
            scale = math.sqrt(sum(float(x.square().sum()) for x in sent) / sum(x.numel() for x in sent))
            amplitude = math.sqrt(fading(seed, self.number, one.task.index))
            loudness.append(self.lambdas[one.task.index] * scale / amplitude)
        # b_k = sqrt(eta) loudness_k is at most 1 for everybody.
        self.deviation = 10 ** (-self.options["snr_db"] / 20) * max(loudness)
        super().step(returned, fresh)

    def arrived(self, key: str, mean: Tensor) -> Tensor:
        draw = generator(self.options["seed"], "over-the-air", self.number, key)
        return mean + self.deviation * torch.from_numpy(draw.standard_normal(tuple(mean.shape)))


@dataclass(frozen=True)
class Physics:
    """One client: FLOPs and steps of an epoch, bits that it sends, units by label."""

    flops: float
    steps: int
    bits: float
    labels: list[int]


class Wireless(FedIT):
    """The best of all subsets and numbers of epochs; options: seed, physics by client, and the method's parameters.

    Tasks have the steps of the most epochs, in the order in which they come.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.queues = dict.fromkeys(self.clients, 0.0)
        self.plans: list[tuple[int, tuple[int, ...]]] = []
        self.number = 0

    def round(self, tasks: list[Task], fresh: Adapters) -> None:
        self.number += 1
        options, clients = self.options, [task.index for task in tasks]
        total = sum(task.samples for task in tasks)
        sets = [s for size in range(options["channels"] + 1) for s in itertools.combinations(clients, size)]
        choices = []
        for epochs in range(1, options["epochs"] + 1):
            costs = {task.index: self._cost(task, epochs, total) for task in tasks}
            choices += [(sum(costs[k][0] for k in chosen), epochs, chosen) for chosen in sets]
        choices.sort(key=lambda choice: choice[0])
        self.margin = min(self.margin, choices[1][0] - choices[0][0])
        _, epochs, chosen = choices[0]
        spent = {task.index: self._cost(task, epochs, total)[1] if task.index in chosen else 0.0 for task in tasks}
        self.queues = {k: max(z + spent[k] - options["energy_j"], 0.0) for k, z in self.queues.items()}
        steps = {k: epochs * options["physics"][k].steps for k in chosen}
        self.plans.append((epochs, chosen))
        own = [replace(task, steps=task.steps[: steps[task.index]]) for task in tasks if task.index in chosen]
        super().round(own, fresh)

    def _cost(self, task: Task, epochs: int, total: int) -> tuple[float, float]:
        """(its term of the sum, its energy); infinite where it cannot meet the deadline."""
        o, k = self.options, task.index
        physics: Physics = o["physics"][k]
        cycles = epochs * physics.flops / o["flops_per_cycle"]
        left = o["deadline_s"] - cycles / o["clock_hz"]
        distance = max(o["radius_m"] * math.sqrt(generator(o["seed"], "distance", k).random()), 10.0)
        gain = 10 ** (-(128.1 + 37.6 * math.log10(distance / 1000)) / 10) * fading(o["seed"], self.number, k)
        noise = o["bandwidth_hz"] * 10 ** (-174 / 10) / 1000
        if left <= 0:
            return math.inf, math.inf
        power = noise / gain * (2 ** (physics.bits / (o["bandwidth_hz"] * left)) - 1)
        if power > o["power_w"]:
            return math.inf, math.inf
        joules = o["capacitance"] * cycles * o["clock_hz"] ** 2 + power * left
        everybody = np.array([one.labels for one in o["physics"].values()]).sum(0)
        mine = np.array(physics.labels)
        apart = sum(abs(a - b) for a, b in zip(mine / mine.sum(), everybody / everybody.sum(), strict=True)) / 2
        worth = task.samples / total * (1 + o["divergence"] * (1 - apart))
        return self.queues[k] * joules - o["trade_off"] * worth * (1 - 2.0**-epochs), joules
