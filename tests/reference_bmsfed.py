"""BMSFed in plain float64: one sample after the other, every modality by itself, every choice by loops.

Legend: C channels of a view, D width of a feature.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from reference_dense import Adapters, DenseReference, Image, Running, Task
from torch import Tensor

from fedmoe_ds.randomness import generator

NUMBERS = 64


@dataclass
class Known:
    """What the server knows of a client: by modality its fingerprint and the mean likeness of the right class."""

    prints: list[list[float]] = field(default_factory=lambda: [[0.0] * NUMBERS] * 2)
    likeness: list[float] = field(default_factory=lambda: [0.0, 0.0])

    @property
    def ratio(self) -> float:
        first, second = self.likeness
        return first / second if first and second else 1.0


def fingerprint(seed: int, changes: dict[str, Tensor], modality: int) -> list[float]:
    """The projection of a client's changes of one expert, number by number."""
    found = [0.0] * NUMBERS
    for key, change in sorted(changes.items()):
        _, layer, _, expert, *name = key.split(".")
        if int(expert) != modality:
            continue
        block, count = ".".join(["experts", *name]), change.numel()
        raw = generator(seed, "fingerprint signs", block, int(layer), modality).integers(0, 256, -(-count // 8), dtype=np.uint8)
        negative = [bool(byte >> (7 - bit) & 1) for byte in raw.tolist() for bit in range(8)]
        order = generator(seed, "fingerprint buckets", block).permutation(count).tolist()
        flat = change.flatten().tolist()
        for place, element in enumerate(order):
            found[place % NUMBERS] += -flat[element] if negative[element] else flat[element]
    return found


def plan(
    seed: int, round_index: int, count: int, samples: dict[int, int], known: dict[int, Known], threshold: float
) -> dict[int, tuple[int, ...]]:
    """Who takes part, with which modalities; `samples` of all clients by index."""
    order = generator(seed, "unseen clients", round_index).permutation(len(samples)).tolist()
    chosen: dict[int, tuple[int, ...]] = {}
    for index in order:
        if index not in known and len(chosen) < count:
            chosen[index] = (0, 1)
    left, seen = sorted(known), sorted(known)
    if not seen or len(chosen) == count:
        return chosen
    mean = sum(samples[k] * known[k].ratio for k in seen) / sum(samples[k] for k in seen)
    weak, picks = 1 if mean > 1 else 0, count - len(chosen)
    by_kind: dict[tuple[int, ...], list[int]] = {(0, 1): [], (weak,): []}
    asked = max(picks, len(seen) // 10)
    for pick in range(min(picks, len(left))):
        drawn = range(len(left))
        if asked < len(left):
            drawn = sorted(generator(seed, "candidates", round_index, pick).choice(len(left), asked, replace=False).tolist())
        candidates = [left[place] for place in drawn]

        def cost(kind: tuple[int, ...], new: int) -> float:
            near = [*by_kind[kind], new]
            return sum(min(_apart(known[k], known[j], kind) for j in near) for k in seen)

        best = {kind: min((cost(kind, one), one) for one in candidates)[1] for kind in by_kind}
        ratio = known[best[(weak,)]].ratio
        kind = (weak,) if (ratio if weak == 1 else 1 / ratio) > threshold else (0, 1)
        chosen[best[kind]] = kind
        by_kind[kind].append(best[kind])
        left.remove(best[kind])
    return chosen


def _apart(one: Known, other: Known, modalities: tuple[int, ...]) -> float:
    return math.sqrt(sum((a - b) ** 2 for m in modalities for a, b in zip(one.prints[m], other.prints[m], strict=True)))


class BMSFedReference(DenseReference):
    """Options: alpha, seed, classes."""

    def __init__(self, *args: Any, alpha: float, seed: int, classes: int = 10) -> None:
        super().__init__(*args)
        self.alpha, self.seed, self.classes, self.modality = alpha, seed, classes, 0
        self.known: dict[int, Known] = {}
        self.prototypes: dict[tuple[int, int], Tensor] = {}
        self._seen: list[Tensor] = []
        self.model.classifier.register_forward_pre_hook(lambda module, given: self._seen.append(given[0]))

    def pool(self, layer: int, x_TD: Tensor) -> Tensor:
        """The running modality's own expert, and no other."""
        run = self.running
        assert run is not None
        return torch.stack([self._expert_at(x_D, run.adapters, f"layers.{layer}.experts.{self.modality}") for x_D in x_TD])

    def seen(self, sample: Image, modality: int) -> tuple[Tensor, Tensor]:
        """Logits and feature of one view of a sample."""
        self.modality, channels = modality, len(sample.pixels) // 2
        self._seen.clear()
        own = replace(sample, pixels=sample.pixels[modality * channels : (modality + 1) * channels])
        logits, _ = self.predictions(own)
        (feature,) = self._seen
        return logits[0], feature[0]

    def round_of(self, tasks: Sequence[Task], modalities: dict[int, tuple[int, ...]]) -> None:
        """All clients from the same global values; an expert moves by the mean over those who train it."""
        trained, features = dict[int, Adapters](), dict[int, dict[tuple[int, int], list[Tensor]]]()
        for task in tasks:
            trained[task.index], features[task.index] = self._local(task, modalities[task.index])
        old = self.adapters
        self.adapters = dict(old)
        for key, value in old.items():
            if ".experts." not in key:
                continue
            holders = [task for task in tasks if int(key.split(".")[3]) in modalities[task.index]]
            whole = sum(task.size for task in holders)
            for task in holders:
                self.adapters[key] = self.adapters[key] + task.size / whole * (trained[task.index][key] - value)
        for place in {place for own in features.values() for place in own}:
            everyone = [feature for own in features.values() for feature in own.get(place, [])]
            self.prototypes[place] = torch.stack(everyone).mean(0)

    def _local(self, task: Task, own: tuple[int, ...]) -> tuple[Adapters, dict[tuple[int, int], list[Tensor]]]:
        adapters = {key: value.clone() for key, value in self.adapters.items()}
        mine = [adapters[key].requires_grad_() for key in adapters if ".experts." in key and int(key.split(".")[3]) in own]
        self.running, optimizer = Running(adapters, 1, np.zeros(0)), self._optimizer(mine)
        features: dict[tuple[int, int], list[Tensor]] = {}
        likeness: dict[int, list[float]] = {m: [] for m in own}
        sizes = [len(step) for step in task.steps]
        used = len({id(sample) for step in task.steps for sample in step})
        for step, samples in enumerate(task.steps):
            optimizer.zero_grad()
            last = sum(sizes[step:]) <= used or step == len(sizes) - 1
            total, right, enhanced = torch.zeros((), dtype=torch.float64), dict.fromkeys(own, 0.0), dict[int, Tensor]()
            for sample in samples:
                assert isinstance(sample, Image)
                found = {m: self.seen(sample, m) for m in own}
                logits = torch.stack([logits for logits, _ in found.values()]).mean(0)
                total = total + logits.logsumexp(-1) - logits[sample.label]
                for m, (_, feature) in found.items():
                    if last:
                        features.setdefault((m, sample.label), []).append(feature.detach())
                    loss = self._by_prototypes(feature, m, sample.label)
                    if loss is not None:
                        enhanced[m] = enhanced.get(m, torch.zeros((), dtype=torch.float64)) + loss
                        right[m] += math.exp(-float(loss.detach()))
                        likeness[m] += [math.exp(-float(loss.detach()))] * last
            weaker = own if len(own) == 1 else [m for m in own if right[m] < right[1 - m]]
            for m in weaker:
                total = total + self.alpha * enhanced.get(m, 0.0)
            (total / len(samples)).backward()
            self._clip(mine)
            optimizer.step()
        done = {key: value.detach() for key, value in adapters.items()}
        self._remember(task.index, own, {key: done[key] - self.adapters[key] for key in done if ".experts." in key}, likeness)
        return done, features

    def _by_prototypes(self, feature_D: Tensor, modality: int, label: int) -> Tensor | None:
        """Cross-entropy of minus the distances; None of a class that a modality has no prototype of."""
        there = [c for c in range(self.classes) if (0, c) in self.prototypes and (1, c) in self.prototypes]
        if label not in there:
            return None
        alike = torch.stack([-(feature_D - self.prototypes[modality, c]).norm() for c in there])
        return F.cross_entropy(alike, torch.tensor(there.index(label)))

    def _remember(self, index: int, own: tuple[int, ...], changes: dict[str, Tensor], likeness: dict[int, list[float]]) -> None:
        before = self.known.get(index, Known())
        after = Known(list(before.prints), list(before.likeness))
        for m in own:
            after.prints[m] = fingerprint(self.seed, changes, m)
            if likeness[m]:
                after.likeness[m] = sum(likeness[m]) / len(likeness[m])
        self.known = {**self.known, index: after}

    @torch.no_grad()
    def evaluate_views(self, samples: Sequence[Image]) -> tuple[float, list[float]]:
        """Mean loss of the mean of the logits, and the accuracy of each modality alone."""
        self.running, total, right = Running(self.adapters, 1, np.zeros(0)), 0.0, [0, 0]
        for sample in samples:
            logits = [self.seen(sample, m)[0] for m in (0, 1)]
            mean = torch.stack(logits).mean(0)
            total += float(mean.logsumexp(-1) - mean[sample.label])
            right = [count + int(own.argmax() == sample.label) for count, own in zip(right, logits, strict=True)]
        return total / len(samples), [count / len(samples) for count in right]
