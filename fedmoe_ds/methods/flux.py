"""Flux: a client tunes the experts that are worth most to it, and runs the others forward only (arXiv 2508.19078).

Legend: L layers, E experts of a layer, B passes of a probe; e is an expert of any layer, i a client, r a round from 1 to R.

READ (public notes on the paper; no public code was found). Every round a client's data give, one round stale, per expert

    f_e = tokens routed to e / all tokens,    abar_e = mean attention score of these tokens,    u_e = |D_e| sqrt(mean_{D_e} g^2)

where D_e are the tokens that reach e and g the gradient at e (the square is the notes' inference). The server assigns roles:

    max sum_i sum_e x_{i,e} u_{i,e}    with    sum_e x_{i,e} <= B_tune of every client             over all layers

Of these candidates the share eps_r with the largest u is tuned by backpropagation (exploited); eps_r grows over the rounds. The
rest of the budget explores experts that are drawn. Tuned experts see their own tokens alone, they alone are sent, and each is
averaged among those that tuned it. Experts that are not tuned are clustered and merged by weights f_e abar_e.

COMPLETION:
- The sum separates by client: its candidates are the B_tune largest u.
- eps_r = min(1, eps + (1 - eps) r / R) with eps = 0.3; a run keeps R (`horizon`).
- B_tune is L times the experts of the client's tier. Layers share it as they like: one may have no tuned expert.
- g^2 is the squared norm of the gradient of all that is trained of the expert, of one sample: a probe of `samples` samples,
  drawn anew in every round, each in a pass of its own before the first step, in which every expert has a gradient. The mean is
  over samples that have one at e, |D_e| counts their tokens; so u does not depend on how a step is cut into batches.
- `samples: 0` is the light form: the gradient of the first step, which exists anyway, of tuned experts. The others keep what
  was found when they were tuned last, or nothing; exploration is then the only way to learn of them.
- Explored experts are drawn among all others, and tuned by backpropagation like the candidates: the paper's forward-only
  estimate ((L(W + xi) - L(W)) / xi, undefined near 0 as printed) would save memory that nothing here saves.
- Who takes part for the first time is known to nobody: all of its budget is drawn.
- `score` has other rules for the candidates: `importance` is f_e abar_e, what the paper merges by; `frequency` is f_e, as
  in selection by use (FMES); `random` draws anew in every round. A token's attention score is the sum over heads of the mean
  over a sequence's tokens of the weight with which they look at it.
- What is not an expert (attention, routers) is trained as the configuration says, and averaged by data size.

Limits. No expert is merged: what is not tuned is still held, and computed, forward. So roles save backward products and bytes
that are sent, no memory. No quantised copy makes the profile: f and abar are those of the round's training. The server knows
L E numbers of every client that was trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from fedmoe_ds.methods import (
    FIRST_STEP,
    Assignment,
    Client,
    ClientUpdate,
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
    add_best,
    generator,
    leading,
)


class FluxParams(MethodParams):
    """How roles are assigned; no value is the paper's."""

    score: Literal["utility", "importance", "frequency", "random"] = Field(
        "utility", description="what experts are worth: u, attention times frequency, frequency, or a draw"
    )
    samples: int = Field(
        4, ge=0, description="samples of the probe that gives u, in every round; 0: gradient of the first step"
    )
    exploit: float = Field(
        0.3, ge=0, le=1, description="eps: share of the budget for the best experts, at the beginning; 1: all"
    )
    horizon: int | None = Field(
        None, ge=1, description="R: rounds until all of the budget is exploited; null: federation.rounds"
    )

    def idle(self, config: Config) -> dict[str, str]:
        found = {} if self.score == "utility" else {"samples": f"with method.score={self.score}: no gradient is asked for"}
        if self.score == "random":
            return found | dict.fromkeys(("exploit", "horizon"), "with method.score=random: everything is drawn")
        return found | {"horizon": "with method.exploit=1: nothing is explored"} if self.exploit == 1 else found

    def resolved(self, config: Config) -> FluxParams:
        if self.horizon is not None or "horizon" in self.idle(config):
            return self
        return self.model_copy(update={"horizon": config.federation.rounds})


@dataclass(frozen=True)
class Roles:
    """A client's part of a plan: which experts it tunes, bool [L, E]."""

    tuned_LE: np.ndarray


class Flux(Method):
    """A budget on the experts that a client trains in a round."""

    Params: ClassVar[type[MethodParams]] = FluxParams
    info = MethodInfo(
        title="Flux",
        paper="arXiv 2508.19078",
        adapts="experts tuned, over all layers",
        trains="tuned experts (LoRA or whole)",
        sends="tuned experts, utility u",
        weighs="experts: data size of those that tune them",
        completion="roles alone, nothing is merged; u by a probe of samples; explored experts are tuned, too",
    )
    spends = "experts"
    needs = frozenset({"experts"})

    def __init__(self, params: FluxParams) -> None:
        super().__init__(params)
        self.attends = params.score == "importance"
        self.observes = ("attention",) if self.attends else ()
        self.looks = params.score == "utility"

    def check_config(self, config: Config) -> None:
        if config.adapters.moe is not None:
            raise UserError(
                "adapters.moe: method flux assigns roles to the experts of a sparse model, and adapter experts are all small; "
                "use a sparse foundation (tiny-olmoe), or fft-moe"
            )

    # What the server knows, and what it plans

    def memory(self) -> dict[str, tuple[int, ...]]:
        return {} if self.params.score == "random" else {"worth": self.facts.experts_shape}

    def memorise(self, update: ClientUpdate) -> dict[str, np.ndarray]:
        if self.looks:
            return {"worth": self.utility(update)}
        # Of one client alone, so that it need not be divided by its tokens; and f abar is the attention of tokens at e.
        found_LE = update.observed["attention"] if self.attends else update.counts_LE.astype(np.float64)
        return {"worth": found_LE / max(update.tokens, 1)}

    def utility(self, update: ClientUpdate) -> np.ndarray:
        """u, float64 [L, E]."""
        assert update.probed is not None
        square_BLE = update.probed.numbers
        # A sample that does not reach an expert has no gradient there.
        found_LE = (square_BLE > 0).sum(0)
        root_LE = np.sqrt(square_BLE.sum(0) / np.maximum(found_LE, 1))
        # The light form has no rows of its own, and knows no more of experts that are not tuned.
        counts_LE = update.probed.counts_LE if self.params.samples else update.counts_LE
        worth_LE: np.ndarray = counts_LE * root_LE
        if not self.params.samples and update.memory:
            worth_LE = np.where(found_LE > 0, worth_LE, update.memory["worth"])
        return worth_LE

    def reduce_probe(self, squares: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
        """Squared gradients of all that is trained of an expert, [L, E]."""
        return sum((square for square in squares.values() if square.ndim == 2), np.zeros(self.facts.experts_shape))

    def plan(self, context: PlanContext) -> RoundPlan:
        parts = {client.index: self.roles(client, context) for client in context.drawn}
        looks = self.params.samples if self.looks else 0
        return RoundPlan([replace(client, probed=min(looks, client.sequences)) for client in context.drawn], parts)

    def roles(self, client: Client, context: PlanContext) -> Roles:
        """The experts that a client tunes: the best of those that are known, and others by lot."""
        budget, nobody_LE = self.facts.experts_shape[0] * client.experts, np.zeros(self.facts.experts_shape, dtype=bool)
        known: Memory = context.memories.get(client.index, {})
        best_LE = add_best(nobody_LE, known["worth"], self.exploited(budget, context.round)) if known else nobody_LE
        lot_LE = generator(self.facts.seed, "flux roles", context.round, client.index).random(self.facts.experts_shape)
        return Roles(add_best(best_LE, lot_LE, budget - int(best_LE.sum())))

    def exploited(self, budget: int, round_index: int) -> int:
        """How many of a budget the best experts get."""
        if self.params.exploit == 1:
            return budget
        eps: float = self.params.exploit + (1 - self.params.exploit) * round_index / self.params.horizon
        # The small number undoes a product's rounding: 0.7 x 10 experts are seven.
        return math.floor(min(eps, 1.0) * budget + 1e-9)

    # What a client does

    def assign(self, client: Client, context: RoundContext) -> Assignment:
        assignment = Assignment(client.cap, leading(client.rank, self.facts.rank))
        if context.plan is None:
            return assignment
        tuned_LE = context.plan.tuned_LE
        trained_LE = None if tuned_LE.all() else tuned_LE
        return replace(assignment, trained_LE=trained_LE, probe=self._probe(client, context.round) if self.looks else None)

    def _probe(self, client: Client, round_index: int) -> tuple[NDArray[np.int64], ...]:
        count = min(self.params.samples, client.sequences)
        if count == 0:
            return FIRST_STEP
        draw = generator(self.facts.seed, "flux probe", round_index, client.index)
        return tuple(np.sort(draw.choice(client.sequences, size=count, replace=False))[:, None])

    def observer(self, client: Client, assignment: Assignment, context: RoundContext) -> RoutingObserver | None:
        return RoutingObserver(attended=partial(attention_by_expert, self.facts.num_experts)) if self.attends else None


@torch.no_grad()
def attention_by_expert(experts: int, routing: Routing, attention_T: Tensor) -> dict[str, Tensor]:
    """The attention that a batch's tokens receive, added up where they are routed to, float64 [E]."""
    slots_TK = attention_T.to(torch.float64).unsqueeze(1) * routing.kept_TK
    # A column per expert, added up along the tokens in one fixed order; adding at indices has none on a GPU.
    received_TE = slots_TK.new_zeros(len(slots_TK), experts).scatter_(1, routing.experts_TK, slots_TK)
    return {"attention": received_TE.sum(0)}
