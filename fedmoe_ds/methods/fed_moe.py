"""FedMoE: every client trains and runs a sub-model, the experts that its own data use (arXiv 2408.11304).

Called `fed-moe`: `fedmoe` is this project. Legend: L layers, E experts, N clients with a sub-model, M = L E.

READ (the paper and public readings of it; no public code was found). A few rounds with all experts give a client's activation

    p_{l,e} = how much its tokens use expert e of layer l

Stage 1, coarse search, by binary search over theta (`clients/expert_budgets.py`):

    max theta   with   sum_e x_{l,e} p_{l,e} >= theta in every layer l,   memory(x) <= alpha M

Modular aggregation: an expert that nobody holds is kept, of one holder copied, of several the mean among its holders; a row of
a router goes with its expert. Stage 2, when a client's training stalls: S are the K clients whose activation is most similar
(cosine), n = mean number of experts of S minus its own; the n best experts outside its sub-model are added, or its |n| worst
dropped, by

    phat_{l,e} = sum_{a in S} sim(a) p_{l,e}(a) / sum_{a in S} sim(a)

If that does not help, it is reverted and the sub-model stays as it is for good. The local objective has the Switch balance
loss.

COMPLETION. The balance loss is off unless `balance_loss` is set: the paper's coefficient is not known (Switch's is 0.01),
and with it a step is not cut into micro-batches. Memory is counted in experts over all layers, L times the tier's experts,
because every expert's adapters weigh the same; every layer keeps `least`, so that top-k is defined. A sub-model's router
has the rows of its experts alone: its softmax, and its balance loss, are over these. The search may use `memory_share`
(alpha) of it and stage 2 the rest: where the search has filled everything, or no other client has a sub-model, a change
changes nothing and still counts as one. What alpha leaves between the best theta and its slots goes to the largest p. p is
the mean softmax score per token and not the share of routed slots, because afterwards a client routes to experts that it
holds alone, while the paper still sends p of all. Loss (mean of the first and the last step's) takes the place of accuracy.
A stall: the loss did not fall by 1 % in `patience` rounds of the client, which are counted as it takes part; the same
decides whether a change has helped. Clients that still profile are similar to nobody. A holder weighs its data size, used
or not.

Limits. A router is one block: where routers are trained, sums are twice as large, so that each row is the mean of its holders',
and the bytes of a client's report count all rows. Every expert's weights stay where they are, on its rank of the cluster: a
sub-model saves compute, and what a client would send, not memory here. The server knows 3 L E numbers of every client that was
trained, on every rank: 25 KB for 16 layers of 64 experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedmoe_ds.methods import (
    ROUTER,
    Assignment,
    BlockSpec,
    Client,
    ClientUpdate,
    ClientView,
    Config,
    Memory,
    Method,
    MethodInfo,
    MethodParams,
    PlanContext,
    RoundContext,
    RoundPlan,
    Routing,
    RoutingObserver,
    UserError,
    Weighing,
    add_best,
    balance_loss,
    best,
    cover,
    drop_worst,
    generator,
    leading,
    scattered,
    upload,
)

PROFILE, SEARCHED, CHANGED, FROZEN = range(4)
"""Phases of a client: all experts, its sub-model, one changed after those of similar clients, one that stays."""
FALL = 0.01
"""A loss that falls by less, relatively, has not fallen."""


class FedMoEParams(MethodParams):
    """The two searches; the paper's values of the last three are not known."""

    profile_rounds: int = Field(5, ge=1, description="rounds of a client with all experts, before its sub-model is searched")
    memory_share: float = Field(0.8, gt=0, le=1, description="alpha: share of the budget that the search may use")
    least: int | None = Field(None, ge=1, description="fewest experts of a layer; null: as many as a token activates")
    search: Literal["max-min", "uniform", "random"] = Field(
        "max-min", description="stage 1; baselines: the same number in every layer, or drawn, as many in all"
    )
    refine: bool = Field(True, description="whether stage 2 happens")
    similar: int = Field(3, ge=1, description="K: clients that stage 2 looks at")
    patience: int = Field(2, ge=1, description="rounds of a client without a fall of its loss that are a stall")
    balance_loss: float = Field(0.0, ge=0, description="coefficient of the load-balance loss over the experts held")

    def idle(self, config: Config) -> dict[str, str]:
        off = "with method.refine=false: nothing follows a stall"
        return {} if self.refine else {"similar": off, "patience": off}


@dataclass(frozen=True)
class SubModel:
    """A client's part of a plan: what it holds in this round, what a change that fails goes back to, and its phase."""

    held_LE: np.ndarray
    before_LE: np.ndarray
    phase: int


class Profiles:
    """Which clients' activation is similar: those that have a sub-model are compared, N of them.

    Whole numbers, whose sums are exact: every rank finds the same clients alike, whatever its processor's order of adding.
    """

    def __init__(self, memories: Mapping[int, Memory]) -> None:
        self._scores = {index: one["scores"] for index, one in memories.items() if one["progress"][1] != PROFILE}

    @cached_property
    def _whole(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Clients, int64 [N], their p, int64 [N, M], and its norms, [N]; not made in a round in which nobody stalls."""
        clients_N = np.array(sorted(self._scores))
        whole_NM = np.rint(np.stack([self._scores[i].ravel() for i in clients_N]) * 2**24).astype(np.int64)
        return clients_N, whole_NM, np.sqrt((whole_NM**2).sum(1))

    def nearest(self, client: int, count: int) -> dict[int, float]:
        """The cosines of the `count` others that are most similar to one of them; of equal ones the lower index."""
        clients_N, whole_NM, norm_N = self._whole
        own = np.searchsorted(clients_N, client)
        likeness_N = whole_NM @ whole_NM[own] / (norm_N * norm_N[own])
        order = [place for place in np.argsort(-likeness_N, kind="stable") if clients_N[place] != client]
        return {int(clients_N[place]): float(likeness_N[place]) for place in order[:count]}


class FedMoE(Method):
    """A sub-model per client."""

    Params: ClassVar[type[MethodParams]] = FedMoEParams
    info = MethodInfo(
        title="FedMoE",
        paper="arXiv 2408.11304",
        adapts="experts held, per layer",
        trains="held experts (LoRA or whole)",
        sends="held experts, activation p, loss",
        weighs="experts, rows of routers: data size of their holders",
        completion="budget in experts over all layers; alpha leaves room for stage 2; stall rule; p is the mean score",
    )
    spends = "experts"
    needs = frozenset({"experts"})
    observes = ("scores",)
    held_softmax = True
    personal_models = True

    def __init__(self, params: FedMoEParams) -> None:
        super().__init__(params)
        # Shares of rows and mean scores are no means over rows, so micro-batches would add up to another loss.
        self.whole_steps = params.balance_loss > 0

    def check_config(self, config: Config) -> None:
        if config.local.balance_loss > 0:
            raise UserError(
                f"local.balance_loss: {config.local.balance_loss}: it would draw rows to experts that a sub-model lacks; use "
                "method.balance_loss, which is over its own"
            )
        if config.adapters.router == "train" or config.adapters.moe is not None:
            # A router is one block: its rows can have holders of their own by weights of its elements alone.
            self.weighing = Weighing(elements=True)
            if config.local.drift in ("fedvra", "feddyn"):
                raise UserError(
                    f"local.drift: {config.local.drift}: its server adds dual variables to one mean of adapters, and rows of "
                    "trained routers are averaged among their holders; use none, fedprox or scaffold"
                )

    # What the server knows, and what it plans

    def memory(self) -> dict[str, tuple[int, ...]]:
        # `progress`: rounds taken part in, phase, best loss, rounds since the loss fell.
        return dict.fromkeys(("scores", "held", "before"), self.facts.experts_shape) | {"progress": (4,)}

    def memorise(self, update: ClientUpdate) -> dict[str, np.ndarray]:
        plan: SubModel = update.plan
        memory = update.memory
        assert update.losses is not None, "a client's memory is written at its home rank, which knows its losses"
        rounds, old, lowest, stale = memory["progress"] if memory else (0.0, PROFILE, np.inf, 0.0)
        # A sub-model is not measured by what all experts reached.
        if plan.phase == SEARCHED and old == PROFILE:
            lowest = np.inf
        loss, phase, before_LE = float(np.mean(update.losses)), plan.phase, plan.before_LE
        fell = loss < (1 - FALL) * lowest
        # Every sub-model gets as many rounds as it takes to call the last one stalled.
        stale = 0.0 if fell else 1.0 if plan.phase != old else stale + 1
        if fell and phase == CHANGED:  # it helped, and may be changed again
            phase, before_LE = SEARCHED, plan.held_LE
        return {
            "scores": update.observed["scores"] / max(update.tokens, 1),
            "held": plan.held_LE.astype(np.float64),
            "before": before_LE.astype(np.float64),
            "progress": np.array([rounds + 1, phase, loss if fell else lowest, stale]),
        }

    def plan(self, context: PlanContext) -> RoundPlan:
        profiles = Profiles(context.memories)
        parts = {client.index: self.next_model(client, context.memories, profiles) for client in context.drawn}
        return RoundPlan(context.drawn, parts)

    def next_model(self, client: Client, memories: Mapping[int, Memory], profiles: Profiles) -> SubModel:
        """What a client holds when it takes part again."""
        own = memories.get(client.index)
        if not own or own["progress"][0] < self.params.profile_rounds:
            everything_LE = np.ones(self.facts.experts_shape, dtype=bool)
            return SubModel(everything_LE, everything_LE, PROFILE)
        held_LE, before_LE = own["held"] > 0, own["before"] > 0
        _, phase, _, stale = own["progress"]
        if phase == PROFILE:
            held_LE = self.search(client, own["scores"])
            return SubModel(held_LE, held_LE, SEARCHED)
        stalled = self.params.refine and stale >= self.params.patience
        if phase == SEARCHED and stalled:
            return SubModel(self.changed(client, memories, profiles), held_LE, CHANGED)
        if phase == CHANGED and stalled:
            return SubModel(before_LE, before_LE, FROZEN)
        return SubModel(held_LE, before_LE, int(phase))

    def budget(self, client: Client) -> tuple[int, int]:
        """(experts over all layers, fewest of a layer)."""
        least = client.cap if self.params.least is None else self.params.least
        return self.facts.experts_shape[0] * client.experts, min(least, client.experts)

    def search(self, client: Client, score_LE: np.ndarray) -> np.ndarray:
        """Stage 1, or one of its baselines: bool [L, E]."""
        most, least = self.budget(client)
        layers = self.facts.experts_shape[0]
        # The small number undoes a product's rounding: 0.7 x 10 slots are seven.
        slots = max(layers * least, int(self.params.memory_share * most + 1e-9))
        if self.params.search == "random":
            draw_LE = generator(self.facts.seed, "sub-model", client.index).random(self.facts.experts_shape)
            return scattered(draw_LE, slots, least)
        if self.params.search == "uniform":
            held_LE = best(score_LE, np.full(layers, slots // layers))
        else:
            _, held_LE = cover(score_LE, slots, least)
        return add_best(held_LE, score_LE, slots - int(held_LE.sum()))

    def changed(self, client: Client, memories: Mapping[int, Memory], profiles: Profiles) -> np.ndarray:
        """Stage 2: more or fewer experts, after those of the most similar clients; bool [L, E]."""
        held_LE = memories[client.index]["held"] > 0
        likeness = profiles.nearest(client.index, self.params.similar)
        if not likeness:
            return held_LE
        similar = [memories[index] for index in likeness]
        missing = int(np.rint(np.mean([np.count_nonzero(one["held"]) for one in similar]) - held_LE.sum()))
        wanted_LE = np.average([one["scores"] for one in similar], axis=0, weights=list(likeness.values()))
        most, least = self.budget(client)
        if missing >= 0:
            return add_best(held_LE, wanted_LE, min(missing, most - int(held_LE.sum())))
        return drop_worst(held_LE, wanted_LE, -missing, least)

    # What a client does, and what it weighs

    def assign(self, client: Client, context: RoundContext) -> Assignment:
        # An evaluation follows no plan: there a client has the sub-model that it trained last, or all experts before that.
        part, known = context.plan, context.memory
        everything_LE = np.ones(self.facts.experts_shape, dtype=bool)
        held_LE = part.held_LE if part is not None else known["held"] > 0 if known else everything_LE
        allowed_LE = None if held_LE.all() else held_LE
        return Assignment(client.cap, leading(client.rank, self.facts.rank), allowed_LE=allowed_LE)

    def observer(self, client: Client, assignment: Assignment, context: RoundContext) -> RoutingObserver | None:
        weight, held_LE = self.params.balance_loss, assignment.allowed_LE
        if weight == 0:
            return RoutingObserver(observe=_sum_scores)
        if held_LE is None:
            return RoutingObserver(_sum_scores, lambda layer, own, *_: weight * balance_loss(own))
        # Layers are called by the model's own indices; masks have a row for each of those with experts.
        held = {
            layer: cache(partial(upload, [np.flatnonzero(row_E)]))
            for layer, row_E in zip(self.facts.layers, held_LE, strict=True)
        }
        return RoutingObserver(
            _sum_scores, lambda layer, own, *_: weight * balance_loss(own, held[layer](own.probs_TE.device)[0])
        )

    def weights(self, spec: BlockSpec, update: ClientUpdate, data_share: float) -> np.ndarray:
        weight = super().weights(spec, update, data_share)
        return weight * update.plan.held_LE if spec.expert else weight

    def element_weights(self, spec: BlockSpec, view: ClientView, update: ClientUpdate) -> Tensor:
        weight = torch.ones_like(view.value(spec))
        if spec.name != ROUTER:
            return weight
        (held_LE,) = upload([update.plan.held_LE.astype(np.float32)], weight.device)
        return weight * held_LE.unsqueeze(-1)


def _sum_scores(routing: Routing, valid_T: Tensor) -> tuple[None, dict[str, Tensor]]:
    """The router's scores of all experts, summed over the tokens of a batch."""
    # Sigmoid routers' scores do not sum to one. Float64: they are compared over rounds and clients.
    score_TE = routing.probs_TE.detach().to(torch.float64)
    return None, {"scores": (score_TE / score_TE.sum(-1, keepdim=True).clamp(min=1e-20)).sum(0)}
