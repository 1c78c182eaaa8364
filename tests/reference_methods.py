"""The published methods in plain float64: one class per method, dictionaries of matrices, loops over clients and keys.

On top of `reference.Reference`'s local training. A client that trains r LoRA rows really gets matrices with r rows, and penalty
terms are written as losses that torch differentiates. Methods whose server works on products are in `reference_products.py`.
Keys are canonical: `layers.0.experts.3.down.lora_A`, `layers.1.attention.q_proj.lora_B`, `layers.0.router.weight`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from reference import Adapters, Extra, Reference, Task, Trained
from reference_server import ServerRule
from torch import Tensor


@dataclass
class Returned:
    """What a client got and gave back, at its own rank."""

    task: Task
    rows: list[int]
    received: Adapters
    trained: Trained
    notes: dict[str, Any] = field(default_factory=dict)


class FedIT:
    """Everybody trains everything; means weighted by data size. The other methods change parts of this.

    Args:
        start: the global adapters before the first round.
        clients: indices of all clients.
        options: numbers of the method.
    """

    frozen: tuple[str, ...] = ()  # endings of the keys that nobody trains
    own: tuple[str, ...] = ()  # endings of the keys that stay with the client
    missing = "zero"  # what LoRA rows that a client lacks count as

    def __init__(
        self, reference: Reference, start: Adapters, clients: list[int], server: ServerRule | None = None, **options: Any
    ) -> None:
        self.reference, self.clients, self.server, self.options = reference, clients, server or ServerRule(), options
        self.adapters = {key: value for key, value in start.items() if not key.endswith(self.own)}
        personal = {key: value for key, value in start.items() if key.endswith(self.own)}
        self.personal = {index: dict(personal) for index in clients}
        self.rescalers = {index: torch.ones(1, dtype=torch.float64) for index in clients}
        self.full = next((len(value) for key, value in start.items() if key.endswith("lora_A")), 1)
        self.notes: dict[str, Any] = {}
        self.margin = math.inf  # how near a decision of the method was to a tie

    def round(self, tasks: list[Task], fresh: Adapters) -> None:
        """One round; `fresh` are newly drawn A matrices, for methods that ask for them."""
        self.step([self.train(task) for task in tasks], fresh)

    def train(self, task: Task) -> Returned:
        rows = self.rows(task)
        received = {key: cut(key, value, rows) for key, value in {**self.adapters, **self.personal[task.index]}.items()}
        trained = self.local(task, received)
        self.rescalers[task.index] = trained.rescaler
        self.personal[task.index] = {key: value for key, value in trained.adapters.items() if key.endswith(self.own)}
        return Returned(task, rows, received, trained, self.notes)

    def rows(self, task: Task) -> list[int]:
        """LoRA rows that the client holds."""
        return list(range(task.rank or self.full))

    def local(self, task: Task, received: Adapters) -> Trained:
        own = self.rescalers[task.index]
        return self.reference.train(task, received, own, self.frozen, extra=self.extra(task, received))

    def extra(self, task: Task, received: Adapters) -> Extra | None:
        return None

    def trains(self, key: str, task: Task) -> bool:
        """Whether the client trains this one of the keys that somebody trains."""
        return True

    def weight(self, key: str, one: Returned) -> float:
        return float(one.task.samples)

    def step(self, returned: list[Returned], fresh: Adapters) -> None:
        """The weighted mean of every key; a key without weight stays."""
        for key, old in list(self.adapters.items()):
            if key.endswith(self.frozen):
                continue
            if (mean := self.mean(key, old, returned)) is not None:
                self.adapters[key] = self.server.step(key, old, self.target(key, self.arrived(key, mean)))

    def mean(self, key: str, old: Tensor, returned: list[Returned]) -> Tensor | None:
        weights = [self.weight(key, one) for one in returned]
        values = [padded(key, one.trained.adapters[key], one.rows, self.missing_value(old)) for one in returned]
        if sum(weights) <= 0:
            return None
        return sum((w * value for w, value in zip(weights, values, strict=True)), torch.zeros_like(old)) / sum(weights)

    def target(self, key: str, mean: Tensor) -> Tensor:
        """Where the server steps to."""
        return mean

    def arrived(self, key: str, mean: Tensor) -> Tensor:
        """The mean as the server receives it."""
        return mean

    def missing_value(self, old: Tensor) -> Tensor:
        return torch.zeros_like(old) if self.missing == "zero" else old

    def memory(self, index: int) -> Adapters:
        """What belongs to one client."""
        return self.personal[index]

    def extras(self) -> dict[str, Adapters]:
        """Further state of the server, by name."""
        return {name: value for name, value in self.server.moments.items() if value}


class Flame(FedIT):
    """Experts weigh (activations / tokens)^t |D|; options: temperature t."""

    def weight(self, key: str, one: Returned) -> float:
        weight = super().weight(key, one)
        parts = key.split(".")
        if parts[2] == "experts":
            weight *= (one.trained.counts[int(parts[1]), int(parts[3])] / one.trained.tokens) ** self.options["temperature"]
        return weight


class FFALoRA(FedIT):
    frozen = ("lora_A",)


class FedSALoRA(FedIT):
    own = ("lora_B",)


class LocalOnly(FedIT):
    own = ("",)


class HFedMoE(FedIT):
    """Equations 3 to 5, 14 to 17, 20 and 21, token by token; options: mix, beta, tau, rank_by, participation."""

    def local(self, task: Task, received: Adapters) -> Trained:
        shape = (self.reference.layers, self.reference.experts)
        usage, importance, trained = np.zeros(shape), np.zeros(shape), np.zeros(shape, dtype=bool)

        def select(layer: int, scores_TE: np.ndarray) -> set[int]:
            information = [self._information(scores_TE, e, importance[layer]) for e in range(shape[1])]
            usage[layer] += sum(scores_TE)
            used = {int(e) for token in scores_TE for e in np.argsort(-token)[: task.cap]}
            ranked = sorted(used, key=lambda e: -information[e])
            assert task.experts is not None
            if len(ranked) > task.experts:
                self._near(information[ranked[task.experts - 1]] - information[ranked[task.experts]])
            active = set(ranked[: task.experts])
            trained[layer, list(active)] = True
            return active

        extra = self.extra(task, received)
        result = self.reference.train(task, received, self.rescalers[task.index], self.frozen, extra=extra, select=select)
        usage /= result.tokens
        self._near(float(np.abs(usage - self.options["tau"]).min()))
        self.notes = {"usage": usage, "importance": importance / len(task.steps), "trained": trained}
        return result

    def _information(self, scores_TE: np.ndarray, e: int, importance_E: np.ndarray) -> float:
        mean = sum(float(token[e]) for token in scores_TE) / len(scores_TE)
        peak = max(float(token[e]) for token in scores_TE)
        s = self.options["mix"] * mean + (1 - self.options["mix"]) * peak
        importance_E[e] += s
        if self.options["rank_by"] == "importance":
            return s
        compression = sum(float(token[e]) * math.log(float(token[e]) / mean) for token in scores_TE) / len(scores_TE)
        return s - self.options["beta"] * compression

    def _near(self, margin: float) -> None:
        self.margin = min(self.margin, margin)

    def weight(self, key: str, one: Returned) -> float:
        parts, notes = key.split("."), one.notes
        layer = int(parts[1])
        used = [e for e in range(self.reference.experts) if notes["usage"][layer, e] >= self.options["tau"]]
        if parts[2] == "router":
            return float(sum(notes["usage"][layer, e] * notes["importance"][layer, e] for e in used))
        if parts[2] != "experts":
            return super().weight(key, one)
        taken = int(parts[3]) in used and (self.options["participation"] == "usage" or notes["trained"][layer, int(parts[3])])
        return super().weight(key, one) if taken else 0.0


class HetLoRA(FedIT):
    """Truncation, tail penalty, self-pruning, weights ||B A||_F; options: ranks, gamma, penalty, pruning, sparsity."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.ranks: dict[int, int] = dict(options["ranks"])

    def rows(self, task: Task) -> list[int]:
        return list(range(self.ranks[task.index]))

    def memory(self, index: int) -> Adapters:
        return {"model.hetlora.rank": torch.tensor([float(self.ranks[index])])}

    def extra(self, task: Task, received: Adapters) -> Extra | None:
        return lambda adapters: self.options["penalty"] * self._tail(adapters, self.ranks[task.index])

    def _tail(self, adapters: Adapters, rank: int) -> Tensor:
        """sum over pairs of ||B[:, floor(gamma r):]||_F ||A[floor(gamma r):]||_F."""
        first = math.floor(self.options["gamma"] * rank)
        return torch.stack([b[:, first:].norm() * a[first:].norm() for _, a, b in pairs(adapters)]).sum()

    def train(self, task: Task) -> Returned:
        one = super().train(task)
        rank = self.ranks[task.index]
        before, after = float(self._tail(one.received, rank)), float(self._tail(one.trained.adapters, rank))
        self.margin = min(self.margin, abs(after - before) / max(before, after))
        if self.options["pruning"] and after < before:
            self.ranks[task.index] = max(1, math.floor(self.options["gamma"] * rank))
        return one

    def weight(self, key: str, one: Returned) -> float:
        if "lora" in key and not has_rows(key, one):
            return 0.0
        if not self.options["sparsity"] or "lora" not in key:
            return super().weight(key, one)
        stem = key.removesuffix("A").removesuffix("B")
        return float((one.trained.adapters[f"{stem}B"] @ one.trained.adapters[f"{stem}A"]).norm())


class EmbracingFL(FedIT):
    """A client trains its last layers, and counts in their means alone."""

    def trains(self, key: str, task: Task) -> bool:
        assert task.layers is not None
        return int(key.split(".")[1]) >= self.reference.layers - task.layers

    def local(self, task: Task, received: Adapters) -> Trained:
        before = tuple(key for key in received if not self.trains(key, task))
        return self.reference.train(task, received, self.rescalers[task.index], before, extra=self.extra(task, received))

    def weight(self, key: str, one: Returned) -> float:
        return super().weight(key, one) if self.trains(key, one.task) else 0.0


class FSLoRA(FedIT):
    """Random rows with the scale R / r; the plain mean of changes."""

    missing = "global"

    def rows(self, task: Task) -> list[int]:
        return super().rows(task) if task.sketch is None else task.sketch

    def local(self, task: Task, received: Adapters) -> Trained:
        scale, extra = self.full / len(self.rows(task)), self.extra(task, received)
        return self.reference.train(task, received, self.rescalers[task.index], self.frozen, scale, extra)

    def weight(self, key: str, one: Returned) -> float:
        return 1.0


class Late(FedIT):
    """A client starts from the adapters of some rounds ago, and its change since then counts; options: delay(index, round)."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.history = [dict(self.adapters)]

    def train(self, task: Task) -> Returned:
        done, now = len(self.history) - 1, self.adapters
        self.adapters = self.history[max(done - self.options["delay"](task.index, done + 1), 0)]
        one = super().train(task)
        self.adapters = now
        return one

    def step(self, returned: list[Returned], fresh: Adapters) -> None:
        for one in returned:
            for key, now in self.adapters.items():
                one.trained.adapters[key] = cut(key, now, one.rows) + (one.trained.adapters[key] - one.received[key])
        super().step(returned, fresh)
        self.history.append(dict(self.adapters))


class Corrected(FedIT):
    """A term of the loss on what the client got and shares, beside the method's own (`class X(FedProx, Method)`)."""

    def extra(self, task: Task, received: Adapters) -> Extra:
        others = super().extra(task, received)
        shared = [key for key in received if key in self.adapters and not key.endswith(self.frozen)]

        def loss(adapters: Adapters) -> Tensor:
            terms = [self.term(key, task, adapters[key], received[key]) for key in shared]
            return torch.stack(terms if others is None else [*terms, others(adapters)]).sum()

        return loss

    def term(self, key: str, task: Task, value: Tensor, old: Tensor) -> Tensor:
        raise NotImplementedError


class FedProx(Corrected):
    """+ mu / 2 ||w - w_global||^2; options: mu."""

    def term(self, key: str, task: Task, value: Tensor, old: Tensor) -> Tensor:
        term: Tensor = self.options["mu"] / 2 * (value - old).square().sum()
        return term


class Scaffold(Corrected):
    """+ <c - c_i, w>; afterwards c_i <- c_i - c + (w_global - w_i) / sum of rates, c <- c + mean of the changes.

    Where a client holds only some LoRA rows, all of that happens in these rows.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        shared = {key: value for key, value in self.adapters.items() if not key.endswith(self.frozen)}
        self.control = {key: torch.zeros_like(value, dtype=torch.float64) for key, value in shared.items()}
        self.controls = {index: dict(self.control) for index in self.clients}

    def term(self, key: str, task: Task, value: Tensor, old: Tensor) -> Tensor:
        correction = self.control[key] - self.controls[task.index][key]
        return (cut(key, correction, self.rows(task)) * value).sum()

    def step(self, returned: list[Returned], fresh: Adapters) -> None:
        super().step(returned, fresh)
        changes = {key: torch.zeros_like(value) for key, value in self.control.items()}
        for one in returned:
            own = self.controls[one.task.index]
            for key, control in self.control.items():
                if not self.trains(key, one.task):
                    continue
                slope = (one.received[key] - one.trained.adapters[key]) / one.trained.rates
                change = padded(key, slope - cut(key, control, one.rows), one.rows, torch.zeros_like(control))
                own[key] = own[key] + change
                changes[key] += change
        self.control = {key: value + changes[key] / len(self.clients) for key, value in self.control.items()}

    def memory(self, index: int) -> Adapters:
        return super().memory(index) | {remembered_key(key, "control"): value for key, value in self.controls[index].items()}

    def extras(self) -> dict[str, Adapters]:
        return super().extras() | {"control": self.control}


class FedVRA(FedProx):
    """+ <l_i, w> beside the proximal term; options: mu, dual (a), ahead (d), sizes (samples of every client).

    l_i <- l_i + a mu (w_i - x) where the client holds rows; L <- L + sum_i p_i change; x <- mean + d L / mu.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        shared = {key: value for key, value in self.adapters.items() if not key.endswith(self.frozen)}
        self.dual = {key: torch.zeros_like(value, dtype=torch.float64) for key, value in shared.items()}
        self.duals = {index: dict(self.dual) for index in self.clients}

    def term(self, key: str, task: Task, value: Tensor, old: Tensor) -> Tensor:
        return super().term(key, task, value, old) + (cut(key, self.duals[task.index][key], self.rows(task)) * value).sum()

    def step(self, returned: list[Returned], fresh: Adapters) -> None:
        for one in returned:
            share = one.task.samples / sum(self.options["sizes"].values())
            for key, total in self.dual.items():
                away = one.trained.adapters[key] - one.received[key]
                change = self.options["dual"] * self.options["mu"] * padded(key, away, one.rows, torch.zeros_like(total))
                self.duals[one.task.index][key] = self.duals[one.task.index][key] + change
                self.dual[key] = self.dual[key] + share * change
        super().step(returned, fresh)

    def target(self, key: str, mean: Tensor) -> Tensor:
        return mean + self.options["ahead"] / self.options["mu"] * self.dual[key]

    def memory(self, index: int) -> Adapters:
        return super().memory(index) | {remembered_key(key, "control"): value for key, value in self.duals[index].items()}

    def extras(self) -> dict[str, Adapters]:
        return super().extras() | {"control": self.dual}


def remembered_key(key: str, word: str) -> str:
    """How the package calls what a client remembers of a block: `word` stands before the last words of the name."""
    parts = key.split(".")
    place = 2 if parts[0] == "model" else 4 if parts[2] == "experts" else 3
    return ".".join([*parts[:place], word, *parts[place:]])


def has_rows(key: str, one: Returned) -> bool:
    """Whether any row of the client went to the expert of this key; other adapters always have rows."""
    parts = key.split(".")
    return parts[2] != "experts" or bool(one.trained.counts[int(parts[1]), int(parts[3])] > 0)


def pairs(adapters: Adapters) -> list[tuple[str, Tensor, Tensor]]:
    """(stem, A, B) of every LoRA pair."""
    stems = [key.removesuffix(".lora_A") for key in adapters if key.endswith(".lora_A")]
    return [(stem, adapters[f"{stem}.lora_A"], adapters[f"{stem}.lora_B"]) for stem in stems]


def cut(key: str, value: Tensor, rows: list[int]) -> Tensor:
    """Only these rows of an A, or columns of a B."""
    if key.endswith("lora_A"):
        return value[rows]
    return value[:, rows] if key.endswith("lora_B") else value


def padded(key: str, value: Tensor, rows: list[int], missing: Tensor) -> Tensor:
    """The inverse of `cut`; the other rows are those of `missing`."""
    whole = missing.clone()
    if key.endswith("lora_A"):
        whole[rows] = value
    elif key.endswith("lora_B"):
        whole[:, rows] = value
    else:
        whole = value
    return whole
