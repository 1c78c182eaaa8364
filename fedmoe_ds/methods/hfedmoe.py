"""HFedMoE: expert importance, resource-aware selection, sparsity-aware aggregation (Fang et al., arXiv 2601.00583).

Legend: T token rows of one batch, L layers, E experts.

In every layer, for every batch b of client c, with the router's softmax score G_e(x) of each token x (equation numbers are the
paper's):
    (3, 4)  cumulative  = mean_x G_e(x),   specific = max_x G_e(x)
    (5)     s(e)  = lambda cumulative + (1 - lambda) specific
    (14)    I(e)  = s(e) - beta mean_x G_e(x) log(G_e(x) / p_e),   p_e = mean_x G_e(x)
    (15)    the C_budget experts with the largest I, among those that the batch is routed to, are trained
The forward pass keeps the model's own routing; gradients exist only through the selected experts, for their adapters, for their
inputs and for the router. The others' rows are computed without autograd, so their backward cost and memory are saved.
    (16)    u_c(e) = mean over the client's tokens of G_e(x)
    (17)    experts: weights |D_c| 1(u_c(e) >= tau)
    (20)    router:  alpha(c) = sum_{e in S_c} u_c(e) s_c(e) / |S_global|,   S_c = {e: u_c(e) >= tau}
    (21)    router <- sum_c alpha(c) router_c

Our completions: tau is `tau_share` / E unless an absolute `tau` is given, as the paper prints it, because the mean of u over
the experts is 1 / E: an absolute 0.02 takes nearly all of 16 experts and none of 128 (0.32 / 16 = 0.02); a sample x is a
token; the tier's budget is a share of the experts; s_c is the mean over the round's batches; alpha is normalised to sum to
one (as printed it is not, and |S_global| then cancels); an expert that no client may average keeps its value; `participation:
trained` (the default) also asks that the expert was trained in some batch, because usage alone does not say so; everything
else that is trained (attention) has data-size weights. `rank_by: importance` selects by s, not I.
"""

from __future__ import annotations

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
    Config,
    Method,
    MethodInfo,
    MethodParams,
    RoundContext,
    Routing,
    RoutingObserver,
    UserError,
    leading,
)


class HFedMoEParams(MethodParams):
    """HFedMoE's coefficients; the paper's values are not known."""

    cumulative: float = Field(0.5, ge=0, le=1, description="lambda: share of the mean score in the importance")
    beta: float = Field(0.1, ge=0, description="weight of the compression term in I")
    tau: float | None = Field(None, ge=0, le=1, description="least u at which an expert is averaged; null: tau_share / E")
    tau_share: float = Field(0.32, ge=0, description="tau as a multiple of 1 / E, which is the mean of u")
    rank_by: Literal["information", "importance"] = Field("information", description="select by I, or by s")
    participation: Literal["usage", "trained"] = Field("trained", description="average used experts, or used and trained ones")
    gate: Literal["importance", "data"] = Field("importance", description="router weights alpha(c), or data size")

    def idle(self, config: Config) -> dict[str, str]:
        beta = {"beta": "with method.rank_by=importance: s has no such term"} if self.rank_by == "importance" else {}
        return beta if self.tau is None else beta | {"tau_share": f"with method.tau={self.tau}"}


class HFedMoE(Method):
    """A budget on the experts that a batch trains."""

    Params: ClassVar[type[MethodParams]] = HFedMoEParams
    info = MethodInfo(
        title="HFedMoE",
        paper="arXiv 2601.00583",
        adapts="experts trained per batch",
        trains="selected experts (LoRA or whole), router",
        sends="experts, router, usage u, importance s",
        weighs="experts: data size where u >= tau; router: sum of u s",
        completion="samples are tokens; normalised alpha; trained experts only",
    )
    spends = "experts"
    needs = frozenset({"experts", "router"})
    observes = ("usage", "importance")
    selective = True

    def check_config(self, config: Config) -> None:
        if config.execution.micro_batch_size is not None:
            raise UserError(
                f"execution.micro_batch_size: {config.execution.micro_batch_size}: HFedMoE selects the experts of a whole "
                "batch; use null"
            )

    @property
    def tau(self) -> float:
        """The least mean score at which a client's expert is averaged."""
        return float(self.params.tau_share / self.facts.num_experts if self.params.tau is None else self.params.tau)

    def assign(self, client: Client, context: RoundContext) -> Assignment:
        return Assignment(client.cap, leading(client.rank, self.facts.rank), trainable=client.experts)

    def observer(self, client: Client, assignment: Assignment, context: RoundContext) -> RoutingObserver | None:
        budget = assignment.trainable or self.facts.num_experts
        return RoutingObserver(observe=lambda routing, _: self.select(routing, None, budget))

    def select(self, routing: Routing, valid_T: Tensor | None, budget: int) -> tuple[Tensor, dict[str, Tensor]]:
        """(bool [E] of at most `budget` experts, sums): equations 3 to 5, 14 and 15 for one batch. None: all rows are valid."""
        # Sigmoid routers' scores do not sum to one; the entropy-like term below needs a distribution. Float64: sums over tokens
        # are compared with tau later.
        score_TE = routing.probs_TE / (routing.probs_TE.sum(-1, keepdim=True) + 1e-20)
        score_TE = (score_TE if valid_T is None else score_TE[valid_T]).double()
        mean_E = score_TE.mean(0)
        mix = self.params.cumulative
        importance_E = mix * mean_E + (1.0 - mix) * score_TE.amax(0)
        information_E = importance_E
        if self.params.rank_by == "information":
            # xlogy: a score of zero contributes nothing, where log would give NaN.
            information_E = importance_E - self.params.beta * torch.xlogy(score_TE, score_TE / mean_E).mean(0)
        # An expert without kept rows cannot be trained, so it must not take a place in the budget.
        used_E = routing.counts_E() > 0
        # Stable: equal experts are taken in order of their ids, on every rank and device.
        ranked_E = information_E.masked_fill(~used_E, float("-inf")).sort(descending=True, stable=True).indices
        active_E = torch.zeros_like(used_E).scatter_(0, ranked_E[:budget], True)
        # Where fewer experts are used than the budget allows, the first places also hold some at -inf. Usage adds up over
        # tokens and importance over batches; `weights` divides by these.
        return active_E & used_E, {"usage": score_TE.sum(0), "importance": importance_E}

    def weights(self, spec: BlockSpec, update: ClientUpdate, data_share: float) -> np.ndarray:
        # Data-size weights for attention, and for the router as well where `gate` says so.
        if not spec.expert and (spec.name != ROUTER or self.params.gate == "data"):
            return super().weights(spec, update, data_share)
        usage_LE = update.observed["usage"] / max(update.tokens, 1)
        # `>=` as printed in (17): at tau = 0 every expert is averaged.
        used_LE = usage_LE >= self.tau
        if spec.name == ROUTER:
            importance_LE = update.observed["importance"] / max(update.steps, 1)
            # Per layer: each layer's router has an alpha of its own, as each has usage and importance of its own.
            alpha_L: np.ndarray = (usage_LE * importance_LE * used_LE).sum(1)
            return alpha_L
        if self.params.participation == "trained":
            used_LE &= update.trained_LE > 0
        weights_LE: np.ndarray = used_LE * data_share
        return weights_LE
