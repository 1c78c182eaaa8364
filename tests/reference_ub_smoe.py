"""UB-SMoE in plain float64: routing and pseudo-gradients token by token and expert by expert.

Keys are those of `reference_methods.py`, whose local training this is.

Legend: T tokens, E experts, D model width.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F
from reference import Adapters, Extra, Task, Trained
from reference_methods import FedIT, Returned
from torch import Tensor

Place = tuple[int, int]
"""(layer, expert)."""


class Offers:
    """What a step's tokens have had to do with experts: how many went there, router probability, and that of the others."""

    def __init__(self) -> None:
        self.rows: dict[Place, float] = defaultdict(float)
        self.probability: dict[Place, float] = defaultdict(float)
        self.missed: dict[Place, float] = defaultdict(float)


class UBSMoE(FedIT):
    """Options: candidates, momentum, eps, and `of`: tokens or batch."""

    frozen = ("router_bias",)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.offers = Offers()
        self.completed = 0  # gradients that were given something

    def local(self, task: Task, received: Adapters) -> Trained:
        reference: Any = self.reference
        reference.mixture, self.offers = self.mixture, Offers()
        result = super().local(task, received)
        del reference.mixture  # what is left is the class's own
        return result

    def mixture(self, layer: int, gate_ED: Tensor, w13_EFD: Tensor, w2_EDF: Tensor, x_TD: Tensor) -> Tensor:
        """sum_j p_j E_j(x), p the softmax of logits of which the candidates' have the bias, over the best candidates."""
        run, adapted, experts = self.reference.running, self.reference._adapted, self.reference.experts
        assert run is not None
        logits_TE = x_TD @ run.adapters.get(f"layers.{layer}.router.weight", gate_ED).T
        run.logits.setdefault(layer, []).append(logits_TE)
        phi, chosen, rows = run.adapters[f"layers.{layer}.router_bias"], list[list[int]](), list[Tensor]()
        for logits_E in logits_TE:
            likes = logits_E.tolist()
            liked = sorted(range(experts), key=lambda e: -likes[e])
            near = liked[: self.options["candidates"]]
            moved = torch.stack([logits_E[e] + (phi[e] if e in near else 0.0) for e in range(experts)])
            rows.append(moved.softmax(0))
            p = rows[-1].tolist()
            best = sorted(near, key=lambda e: -p[e])
            self.close([likes[e] for e in liked], len(near))
            self.close([p[e] for e in best], run.cap)
            chosen.append(best[: run.cap])
            for e in range(experts):
                self.offers.probability[layer, e] += p[e]
                self.offers.rows[layer, e] += e in chosen[-1]
                self.offers.missed[layer, e] += 0.0 if e in chosen[-1] else p[e]
        y_TD, probs_TE = torch.zeros_like(x_TD), torch.stack(rows)
        for expert in range(experts):
            mine = torch.tensor([t for t, best in enumerate(chosen) if expert in best], dtype=torch.long)
            run.counts[layer, expert] += len(mine)
            key = f"layers.{layer}.experts.{expert}"
            gate, up = adapted(x_TD[mine], w13_EFD[expert], f"{key}.gate_up").chunk(2, dim=-1)
            out = adapted(F.silu(gate) * up, w2_EDF[expert], f"{key}.down")
            y_TD = y_TD.index_add(0, mine, probs_TE[mine, expert, None] * out)
        return y_TD

    def close(self, ranked: list[float], count: int) -> None:
        """How near the last of those that are taken is to the first that is not."""
        if count < len(ranked):
            self.margin = min(self.margin, ranked[count - 1] - ranked[count])

    def extra(self, task: Task, received: Adapters) -> Extra | None:
        """Nothing is added to the loss; by now the step's gradients are there, and are completed."""
        others = super().extra(task, received)

        def loss(adapters: Adapters) -> Tensor:
            self.complete(adapters, 1.0 - task.cap / self.reference.experts)
            nothing = torch.stack([0.0 * value.sum() for value in adapters.values() if value.requires_grad]).sum()
            return nothing if others is None else others(adapters)

        return loss

    def complete(self, adapters: Adapters, rho: float) -> None:
        offers, self.offers = self.offers, Offers()
        for layer in range(self.reference.layers):
            places = [(layer, e) for e in range(self.reference.experts)]
            tokens = sum(offers.probability[place] for place in places)
            used = [place for place in places if offers.rows[place]]
            whole = sum(offers.probability[place] for place in used)
            for kind in {key.split(".", 4)[4] for key in adapters if key.startswith(f"layers.{layer}.experts.")}:
                slopes = {place: adapters[f"layers.{layer}.experts.{place[1]}.{kind}"].grad for place in places}
                terms = [offers.probability[place] / whole * slope for place in used if (slope := slopes[place]) is not None]
                mean = torch.stack(terms).sum(0)
                for place in places:
                    part = offers.missed[place] if self.options["of"] == "tokens" or not offers.rows[place] else 0.0
                    slope = slopes[place]
                    assert slope is not None
                    slope += rho * part / tokens * mean
                    self.completed += part > 0

    def step(self, returned: list[Returned], fresh: Adapters) -> None:
        super().step(returned, fresh)
        total, zeta = sum(one.trained.tokens for one in returned), self.options["momentum"]
        shares = [one.trained.tokens / total for one in returned]
        target = sum(share * one.task.cap for share, one in zip(shares, returned, strict=True)) / self.reference.experts
        for layer in range(self.reference.layers):
            phi = self.adapters[f"layers.{layer}.router_bias"].clone()
            for e in range(self.reference.experts):
                served = [one.trained.counts[layer, e] / one.trained.tokens for one in returned]
                used = sum(share * part for share, part in zip(shares, served, strict=True))
                phi[e] = zeta * phi[e] + (1 - zeta) * math.tanh(target / (used + self.options["eps"]) - 1)
            self.adapters[f"layers.{layer}.router_bias"] = phi


class ObservedUBSMoE(UBSMoE):
    """Gradients, rows of experts and router probabilities are the package's."""

    def local(self, task: Task, received: Adapters) -> Trained:
        reference: Any = self.reference
        self.steps = iter(reference.offers[task.index])
        return FedIT.local(self, task, received)

    def complete(self, adapters: Adapters, rho: float) -> None:
        rows_LE, probability_LE, missed_LE = next(self.steps)
        for place in ((layer, e) for layer in range(self.reference.layers) for e in range(self.reference.experts)):
            self.offers.rows[place] = float(rows_LE[place])
            self.offers.probability[place] = float(probability_LE[place])
            self.offers.missed[place] = float(missed_LE[place])
        super().complete(adapters, rho)
