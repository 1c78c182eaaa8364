"""Methods with an objective of their own at the model's output, in plain float64: FLood, PRISM, FedFM, BMSFed; by target.

Keys are those of `reference_methods.py`, whose local training this is.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from reference import Adapters, Task, Trained
from reference_methods import FedIT, Returned
from torch import Tensor


class FLood(FedIT):
    """Options: alpha, quantile, temperature, amplitude, horizon; the schedule is the cosine."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.rounds = 0

    def round(self, tasks: list[Task], fresh: Adapters) -> None:
        self.rounds += 1
        super().round(tasks, fresh)

    def local(self, task: Task, received: Adapters) -> Trained:
        sizes, taken, scores = [len(step) for step in task.steps], iter(range(len(task.steps))), list[float]()
        amplitude, horizon, temperature = (self.options[name] for name in ("amplitude", "horizon", "temperature"))
        weight = amplitude * (1 - math.cos(math.pi * self.rounds / horizon))

        def objective(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
            step = next(taken)
            own = [temperature * math.log(sum(math.exp(z / temperature) for z in row)) for row in logits_NV.tolist()]
            ranked = sorted(own)
            place = int(self.options["quantile"] * (len(own) - 1) + 1e-9)
            # Tokens after one and the same beginning have one and the same score, here and there: they are no near tie.
            limit = ranked[place] - 1e-12
            self.margin = min([self.margin, *(ranked[place] - score for score in ranked[:place] if score < limit)])
            # The last pass over the client's samples: no more of them are left than it has, or uses.
            if sum(sizes[step:]) <= min(task.samples, sum(sizes)) or step == len(sizes) - 1:
                scores.extend(own)
            total = torch.zeros((), dtype=torch.float64)
            for row, label, score in zip(logits_NV, labels_N, own, strict=True):
                total = total + (weight if score < limit else 1.0) * (row.logsumexp(-1) - row[label])
            return total

        self.reference.objective = objective
        result = super().local(task, received)
        self.reference.objective = None
        self.notes = {"score": max(sum(scores) / len(scores), 0.0)}
        return result

    def step(self, returned: list[Returned], fresh: Adapters) -> None:
        """Two means, each normalised by itself, mixed 1 : alpha."""
        samples, alpha = [one.task.samples for one in returned], self.options["alpha"]
        scores = [one.notes["score"] for one in returned]
        for key, old in list(self.adapters.items()):
            if not key.endswith(self.frozen):
                values = [one.trained.adapters[key] for one in returned]
                means = [
                    sum((w * value for w, value in zip(weights, values, strict=True)), torch.zeros_like(old)) / sum(weights)
                    for weights in (samples, scores)
                ]
                self.adapters[key] = self.server.step(key, old, (means[0] + alpha * means[1]) / (1 + alpha))


class ObservedFLood(FLood):
    """Scores are the package's; the gradients are replayed (`replay.py`)."""

    def local(self, task: Task, received: Adapters) -> Trained:
        result = FedIT.local(self, task, received)
        replay: Any = self.reference
        observed = replay.updates[task.index].observed
        self.notes = {"score": max(float(observed["score"]) / float(observed["scored"]), 0.0)}
        return result


class PRISM(FedIT):
    """Options: rho, horizon, most (samples of the largest client), by client `data`, `draw` (client, round, samples) -> steps.

    A sample's parts are LoRA pairs, and matrices that are trained themselves.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.rounds, self.known = 0, dict[int, list[float]]()

    def round(self, tasks: list[Task], fresh: Adapters) -> None:
        self.rounds += 1
        super().round(tasks, fresh)

    def local(self, task: Task, received: Adapters) -> Trained:
        data = self.options["data"][task.index]
        chosen, reinforced = list(range(len(data))), False
        if task.index not in self.known:
            self.known[task.index] = [self.concentration(task, received, *sample) for sample in data]
        else:
            found, count = self.known[task.index], math.floor(self.options["rho"] * len(data) + 0.5)
            order = sorted(chosen, key=lambda i: -found[i])
            self.margin = min(self.margin, found[order[count - 1]] - found[order[count]])
            left = self.options["horizon"] - math.floor(self.options["rho"] * self.options["horizon"] + 0.5)
            reinforced = self.rounds > left
            chosen = sorted(order[:count] if reinforced else order[count:])
        steps = self.options["draw"](task.index, self.rounds, np.array(chosen))
        if reinforced:
            self.reference.objective = lambda logits_NV, labels_N: torch.stack(
                [-row.softmax(-1)[label] for row, label in zip(logits_NV, labels_N, strict=True)]
            ).sum()
        result = super().local(replace(task, steps=[[data[i] for i in step] for step in steps]), received)
        self.reference.objective = None
        self.notes = {"share": len(chosen) / len(data)}
        return result

    def concentration(self, task: Task, received: Adapters, ids: np.ndarray, mask: np.ndarray) -> float:
        """Gini coefficient of the lengths of a sample's gradient, as the mean difference of all pairs."""
        adapters = {key: value.clone().requires_grad_() for key, value in received.items()}
        self.reference.start(adapters, self.rescalers[task.index], task.cap)
        (self.reference.loss_sum(ids, mask) / int(mask.sum())).backward()
        squares: dict[str, float] = {}
        for key, value in adapters.items():
            own = 0.0 if value.grad is None else float(value.grad.square().sum())
            module = key.removesuffix(".lora_A").removesuffix(".lora_B")
            squares[module] = squares.get(module, 0.0) + own
        lengths = [math.sqrt(square) for square in squares.values()]
        apart = sum(abs(a - b) for a in lengths for b in lengths)
        return apart / (2 * len(lengths) * sum(lengths))

    def weight(self, key: str, one: Returned) -> float:
        return float(one.task.samples) * float(one.notes["share"])

    def memory(self, index: int) -> Adapters:
        found = torch.tensor(self.known.get(index, []), dtype=torch.float64)
        return super().memory(index) | {"model.prism.gini": torch.cat([found, torch.zeros(self.options["most"] - len(found))])}


class ObservedPRISM(PRISM):
    """Numbers and parts are the package's; the gradients are replayed (`replay.py`)."""

    def local(self, task: Task, received: Adapters) -> Trained:
        result = FedIT.local(self, task, received)
        replay: Any = self.reference
        update = replay.updates[task.index]
        if update.probed is not None:
            self.known[task.index] = update.probed.numbers.tolist()
        self.notes = {"share": update.client.trained_sequences / update.client.sequences}
        self.options["most"] = max(self.options["sizes"].values())
        return result


class FedFM(FedIT):
    """Options: matching, temperature, classes; anchors of the last local epoch."""

    statistic = "anchors"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.anchors: Adapters = {}

    def local(self, task: Task, received: Adapters) -> Trained:
        sizes, micro = [len(step) for step in task.steps], self.reference.settings.micro
        passes = iter([step for step, size in enumerate(sizes) for _ in range(-(-size // (micro or size)))])
        seen: dict[str, list[Tensor]] = {}
        known = sorted(self.anchors)

        def objective(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
            step = next(passes)
            total = torch.zeros((), dtype=torch.float64)
            for row, label, feature in zip(logits_NV, labels_N, torch.cat(self.reference.features), strict=True):
                total = total + row.logsumexp(-1) - row[label]
                key = f"keys.{int(label)}.anchors"
                if key in known:
                    cosines = torch.stack([self.anchors[each] / self.anchors[each].norm() for each in known]) @ feature
                    cosines = cosines / feature.norm() / self.options["temperature"]
                    total = total + self.options["matching"] * (cosines.logsumexp(-1) - cosines[known.index(key)])
                if sum(sizes[step:]) <= min(task.samples, sum(sizes)) or step == len(sizes) - 1:
                    seen.setdefault(key, []).append(feature.detach())
            return total

        self.reference.objective = objective
        result = super().local(task, received)
        self.reference.objective = None
        self.notes = {"seen": {key: torch.stack(features) for key, features in seen.items()}}
        return result

    def step(self, returned: list[Returned], fresh: Adapters) -> None:
        super().step(returned, fresh)
        self.average([one.notes["seen"] for one in returned])

    def average(self, seen: list[Adapters]) -> None:
        """Every class's mean over all targets of it; a class that nobody has keeps its anchor."""
        for key in {key for one in seen for key in one}:
            self.anchors[key] = torch.cat([one[key] for one in seen if key in one]).mean(0)

    def extras(self) -> dict[str, Adapters]:
        nothing, found = torch.zeros_like(next(iter(self.anchors.values()))), dict[str, Tensor]()
        for c in range(self.options["classes"]):
            key = f"keys.{c}.{self.statistic}"
            found |= {key: self.anchors.get(key, nothing), f"{key}.known": torch.tensor([float(key in self.anchors)])}
        return super().extras() | {"statistics": found}


class ObservedFedFM(FedFM):
    """Class sums are the package's; the gradients are replayed (`replay.py`)."""

    def local(self, task: Task, received: Adapters) -> Trained:
        result = FedIT.local(self, task, received)
        replay: Any = self.reference
        observed = replay.updates[task.index].observed
        sums, counts = (torch.from_numpy(observed[name]) for name in ("features_per_class", "targets_per_class"))
        present = counts.nonzero().flatten().tolist()
        self.notes = {"seen": {f"keys.{c}.{self.statistic}": (sums[c] / counts[c]).expand(int(counts[c]), -1) for c in present}}
        return result


class ObservedBMSFed(ObservedFedFM):
    """Clients that are drawn, with both modalities: prototypes by modality, experts as FedIT's, and routers as they were."""

    frozen = ("router.weight",)
    statistic = "prototypes"
