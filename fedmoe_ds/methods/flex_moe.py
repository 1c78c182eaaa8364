"""FLEX-MoE: clients hold the experts that fit their data, and every expert is held by about as many (arXiv 2512.23070).

Legend: C clients of a round, L layers, E experts.

READ (the paper and public readings of it; no public code was found). Fitness of an expert for a client, from the client's loss
on what the expert served, remembered from round to round on the experts that were assigned to it:

    s_{c,e} = exp(-alpha_L l_{c,e}),    Q(c, e) <- (1 - beta) Q(c, e) + beta s_{c,e}

A linear program assigns experts before a round: max sum Q x under sum_e x_{c,e} <= k_c, bounds on the number of clients of
every expert, x in [0, 1], and a term for what an expert has missed so far. Experts are averaged among those they are assigned
to, weighted by use; everything else is averaged by data size; the router stays with its client.

COMPLETION. One program per mixture layer (`clients/balanced_assignment.py`, integral), over the round's participants: who
trains nothing is no load. k_c is the tier's number of experts, and filled: every fitness is positive, and some full assignment
keeps the bounds. With the mean load Cbar = sum_c k_c / E the bounds are floor((1 - d) Cbar) and ceil((1 + d) Cbar). What an
expert has missed enters what is maximised, which cannot make the program infeasible as moved bounds could:

    Q(c, e) + kappa D_e / max(1, max D),    D_e = max(0, mean_e' A_e' - A_e),    A_e = how often e was assigned so far

With kappa 0.1 experts that nobody likes stay at the lower bound for good (docs/log.md); 0.5 evens loads out over rounds.
l_{c,e} is the mean negative log-likelihood of the targets whose token was routed to e, the form per token of the paper's loss
per sample; of an image that is its class token. Q begins with the first s. An expert that a client has never had counts as with
the others on average, and as the mean of all that is known where nobody has had it; equal ones are told apart by an addressed
draw below 0.001, so that clients do not all begin with the first ones. An evaluation uses the experts that a client trained
last, and all of them where it has trained none. `score: random` draws Q anew for every client and round; no bounds and kappa 0
are the greedy choice of the best k_c.

Limits. Where a client holds no more experts than its token activates, all of them serve all of its tokens and have one fitness.
Where alpha_L l is far above one, fitness is near zero for all, and what was missed decides. Every rank solves the same programs
before every round. Every expert's weights stay where they are, on its rank of the cluster: few experts save what a client would
send, and compute where they are fewer than its token activates, not memory here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from fedmoe_ds.methods import (
    EXPERT_LOSS,
    EXPERT_TARGETS,
    ROUTER,
    Assignment,
    BlockSpec,
    Client,
    ClientUpdate,
    Config,
    Memory,
    Method,
    MethodInfo,
    MethodParams,
    Objective,
    PlanContext,
    RoundContext,
    RoundPlan,
    UserError,
    balanced,
    generator,
    leading,
    load_bounds,
    loss_per_expert,
)

TOLD_APART = 1e-3
"""Below it is what tells experts apart of which nothing else is known."""
LEAST = 2.0**-1000
"""Of a fitness that was seen."""


class FlexMoEParams(MethodParams):
    """Fitness and loads; the paper's values are not known."""

    alpha: float = Field(1.0, gt=0, description="alpha_L: how fast fitness falls with the loss; about 1 / loss")
    beta: float = Field(0.3, gt=0, le=1, description="share of the last round in the fitness")
    tolerance: float | None = Field(
        0.1, ge=0, le=100, description="d: how far loads may be from their mean; null: as far as they go"
    )
    kappa: float = Field(0.5, ge=0, le=100, description="weight of what an expert has missed so far")
    score: Literal["fitness", "random"] = Field("fitness", description="what assigns experts; baseline: drawn numbers")

    def idle(self, config: Config) -> dict[str, str]:
        drawn = "with method.score=random: experts are drawn, not found by fitness"
        return {"alpha": drawn, "beta": drawn} if self.score == "random" else {}


class FlexMoE(Method):
    """Experts by fitness under balanced loads."""

    Params: ClassVar[type[MethodParams]] = FlexMoEParams
    info = MethodInfo(
        title="FLEX-MoE",
        paper="arXiv 2512.23070",
        adapts="experts assigned, per layer",
        trains="assigned experts (LoRA or whole), own router",
        sends="assigned experts, loss per expert; the router stays",
        weighs="experts: routed rows of those they are assigned to",
        completion="bounds, what is missed and its weight; loss per token; unknown fitness; budgets are filled",
    )
    spends = "experts"
    needs = frozenset({"experts", "router"})
    personal_models = True

    def check_config(self, config: Config) -> None:
        if config.local.balance_loss > 0:
            raise UserError(
                f"local.balance_loss: {config.local.balance_loss}: it would draw rows to experts that a client is not "
                "assigned; use 0: the assignment balances loads (method.tolerance, method.kappa)"
            )

    def blocks(self, specs: list[BlockSpec]) -> list[BlockSpec]:
        return [replace(spec, personal=True) if spec.name == ROUTER else spec for spec in specs]

    # What the server knows, and what it plans

    def memory(self) -> dict[str, tuple[int, ...]]:
        # Q, zero where it was never seen; which experts were assigned last; how often each was.
        return dict.fromkeys(("fitness", "held", "assigned"), self.facts.experts_shape)

    def memorise(self, update: ClientUpdate) -> dict[str, np.ndarray]:
        held_LE = update.plan.astype(np.float64)
        old = update.memory or {name: np.zeros(shape) for name, shape in self.memory().items()}
        targets_LE = update.observed[EXPERT_TARGETS]
        # Above zero, which stands for what was never seen, however large a loss is.
        now_LE = np.exp(-self.params.alpha * update.observed[EXPERT_LOSS] / np.maximum(targets_LE, 1)).clip(LEAST)
        before_LE = np.where(old["fitness"] > 0, old["fitness"], now_LE)
        moved_LE = (1 - self.params.beta) * before_LE + self.params.beta * now_LE
        return {
            "fitness": np.where((targets_LE > 0) & update.plan, moved_LE, old["fitness"]),
            "held": held_LE,
            "assigned": old["assigned"] + held_LE,
        }

    def plan(self, context: PlanContext) -> RoundPlan:
        budget_C = np.array([client.experts for client in context.drawn])
        bounds = load_bounds(budget_C, self.facts.experts_shape[1], self.params.tolerance)
        value_CLE = self.fitness(context) + self.params.kappa * missed(known(context), self.facts.experts_shape)
        taken_CLE = np.stack([balanced(value_CE, budget_C, *bounds) for value_CE in value_CLE.transpose(1, 0, 2)], axis=1)
        load_LE = taken_CLE.sum(0)
        parts = {client.index: taken_LE for client, taken_LE in zip(context.drawn, taken_CLE, strict=True)}
        return RoundPlan(context.drawn, parts, load_variation=float((load_LE.std(1) / load_LE.mean(1)).mean()))

    def fitness(self, context: PlanContext) -> np.ndarray:
        """Q of the round's clients, [C, L, E]."""
        if self.params.score == "random":
            address = [("random experts", context.round, client.index) for client in context.drawn]
            return np.stack([generator(self.facts.seed, *place).random(self.facts.experts_shape) for place in address])
        usual_LE = usual(known(context), self.facts.experts_shape)
        return np.stack([self._own(client, context.memories.get(client.index, {}), usual_LE) for client in context.drawn])

    def _own(self, client: Client, memory: Memory, usual_LE: np.ndarray) -> np.ndarray:
        # One draw per client and not per round: what nobody knows is no reason to change experts.
        draw_LE = generator(self.facts.seed, "unknown experts", client.index).random(self.facts.experts_shape)
        guess_LE = usual_LE + TOLD_APART * draw_LE
        own_LE: np.ndarray = np.where(memory["fitness"] > 0, memory["fitness"], guess_LE) if memory else guess_LE
        return own_LE

    # What a client does, and what it weighs

    def assign(self, client: Client, context: RoundContext) -> Assignment:
        held_LE = context.plan if context.plan is not None else context.memory["held"] > 0 if context.memory else None
        # A mask of all experts is none, which costs nothing.
        allowed_LE = None if held_LE is None or held_LE.all() else held_LE
        return Assignment(client.cap, leading(client.rank, self.facts.rank), allowed_LE=allowed_LE)

    def objective(self, client: Client, assignment: Assignment, context: RoundContext) -> Objective | None:
        return loss_per_expert(self.facts.num_experts)

    def sums(self) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys((EXPERT_LOSS, EXPERT_TARGETS), self.facts.experts_shape)

    def weights(self, spec: BlockSpec, update: ClientUpdate, data_share: float) -> np.ndarray:
        # Nothing is routed to an expert that is not assigned, so its count is zero by itself.
        return update.counts_LE.astype(np.float64) if spec.expert else super().weights(spec, update, data_share)


def known(context: PlanContext) -> list[Memory]:
    """What is known of clients, in one order: they are added up, and in which order they were trained is the topology's."""
    return [context.memories[index] for index in sorted(context.memories)]


def usual(memories: Sequence[Memory], shape: tuple[int, int]) -> np.ndarray:
    """What a client expects of an expert that it never had: the mean over those that had it, else over all that is known."""
    count_LE = sum((one["fitness"] > 0 for one in memories), np.zeros(shape))
    total_LE = sum((one["fitness"] for one in memories), np.zeros(shape))
    mean = total_LE.sum() / max(count_LE.sum(), 1.0)
    expected_LE: np.ndarray = np.where(count_LE > 0, total_LE / np.maximum(count_LE, 1.0), mean)
    return expected_LE


def missed(memories: Sequence[Memory], shape: tuple[int, int]) -> np.ndarray:
    """How much less often than the mean an expert was assigned so far, at most 1 in every layer: [L, E]."""
    assigned_LE = sum((one["assigned"] for one in memories), np.zeros(shape))
    deficit_LE = np.maximum(assigned_LE.mean(1, keepdims=True) - assigned_LE, 0.0)
    share_LE: np.ndarray = deficit_LE / np.maximum(deficit_LE.max(1, keepdims=True), 1.0)
    return share_LE
