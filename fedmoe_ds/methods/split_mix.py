"""Split-Mix and SHEFL: a client trains as many small base models as its budget allows; an ensemble of them serves it.

Split-Mix: Hong et al., arXiv 2203.09747. SHEFL: arXiv 2508.08552. Legend: M base models = E experts, L layers with experts.

    client k trains the bases B_k, |B_k| = n_k <= M:    min over every m in B_k of  mean over its batch of CE(f_m(x), y)
    w_m <- w_m + sum_{k: m in B_k} q_k S_k(w_{k,m} - w_m) / sum_{k: m in B_k} q_k
    at a budget of n models:    f(x) = 1/n sum_{m < n} f_m(x)        (logits)

CODE (Split-Mix; illidanlab/SplitMix @ fa163f78): M = 8 independently initialised bases, each an eighth of the largest width;
n_k = int(R_k / (1/8)); the first base of a client comes from a shuffled list that all clients and rounds go through, so that
each base is the first once per cycle, the others are drawn without replacement; the losses of a mini-batch are added and one
optimizer steps; q_k = |D_k|, S_k(z) = z; a base that nobody trained in a round is kept; at a smaller width the logits of the
first n bases are averaged.

READ (SHEFL; abstracts of v1 and v2): a global deep ensemble; how many of its models a client trains follows its resources; an
aggregation that corrects the bias between capacities (v1: the influence of weak clients is reduced where resources are scarce,
raised otherwise); per-client dynamic sparsification of what is sent, top-k. NOT FOUND: every formula, M, and public code.

COMPLETION:
- Base m is the frozen foundation with adapter expert m alone, in every layer: no row meets two experts, so bases share nothing
  that is trained. `adapters.moe.experts` is M, `federation.tiers.N.experts` n_k. Routers have nothing to choose, and stay.
- The list goes on from round to round where every round draws as many clients; where it does not (devices that are off), a
  round begins elsewhere in it. How often bases are first within a round differs by two at most: by one where it begins a
  cycle. `deal: first` is a baseline: every client trains the first n_k bases, as with nested slices of one model.
- SHEFL: q_k = |D_k| (n_k / M)^kappa: kappa > 0 is the reduced influence of weak clients, below 0 it is raised. Of every tensor
  with n numbers S_k keeps the ceil(rho_k n) of largest magnitude (ties by place), rho_k = min(rho, U / n_k): a client sends at
  most as many numbers as U bases have. No error feedback: a client of a fleet may never come back. With kappa = 0 and rho = 1
  SHEFL is Split-Mix, to the bit.

Limits: bases share a frozen trunk, so they are less diverse than small networks of their own, and a base costs a pass through
the whole trunk: n models cost n times the FLOPs of one, where Split-Mix's slices cost n/M of the wide network. `local.clip`
bounds the gradient of all bases of a client together. Adversarially trained bases (Split-Mix's robustness) are not here.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from fedmoe_ds.methods import (
    Assignment,
    BlockSpec,
    Client,
    ClientUpdate,
    Config,
    Method,
    MethodInfo,
    MethodParams,
    PlanContext,
    RoundContext,
    RoundPlan,
    UserError,
    check_own_experts,
    generator,
    without_routers,
)


class SplitMixParams(MethodParams):
    """Which base models a client trains."""

    deal: Literal["cyclic", "first"] = Field(
        "cyclic",
        description="cyclic: the first of a client's bases in turn, the others drawn; first: the first n_k, a baseline",
    )


class SplitMix(Method):
    """Base models dealt in turn; an ensemble of as many as the budget buys."""

    Params: ClassVar[type[MethodParams]] = SplitMixParams
    info = MethodInfo(
        title="Split-Mix",
        paper="arXiv 2203.09747",
        adapts="base models trained, and averaged when serving",
        trains="the adapter experts that are its bases (dense foundation)",
        sends="its bases",
        weighs="data size among those who train the base",
        completion="a base is an adapter expert on a frozen trunk; the list across unequal rounds",
    )
    spends = "experts"
    ensembles = True

    def check_config(self, config: Config) -> None:
        check_own_experts(config, self.info.title, "base model")

    def blocks(self, specs: list[BlockSpec]) -> list[BlockSpec]:
        return without_routers(specs)

    # Which bases

    def plan(self, context: PlanContext) -> RoundPlan:
        first = (context.round - 1) * len(context.drawn)
        parts = {client.index: self.bases(client, context.round, first + i) for i, client in enumerate(context.drawn)}
        load_E = np.bincount(np.concatenate(list(parts.values())), minlength=self.facts.num_experts)
        return RoundPlan(context.drawn, parts, load_variation=float(load_E.std() / load_E.mean()))

    def bases(self, client: Client, round_index: int, turn: int) -> np.ndarray:
        """The bases that a client trains, int64 [n_k]; `turn` is its place in the list that everybody goes through."""
        count, seed = self.facts.num_experts, self.facts.seed
        if self.params.deal == "first":
            return np.arange(client.experts)
        # A permutation for each cycle: nobody needs to have gone through the earlier ones.
        cycle, place = divmod(turn, count)
        first = generator(seed, "base models", cycle).permutation(count)[place]
        others = np.delete(np.arange(count), first)
        more = generator(seed, "more base models", round_index, client.index).choice(others, client.experts - 1, replace=False)
        return np.sort(np.append(more, first))

    def assign(self, client: Client, context: RoundContext) -> Assignment:
        # An evaluation is of the first n bases: those of a tier's last round would be of one of its clients.
        bases = np.arange(client.experts) if context.plan is None else context.plan
        members_MLE = np.zeros((len(bases), len(self.facts.layers), self.facts.num_experts), dtype=bool)
        members_MLE[np.arange(len(bases)), :, bases] = True
        return Assignment(client.cap, members_MLE=members_MLE)


class SHEFLParams(SplitMixParams):
    """Which base models a client trains, what it weighs, and how much of them it sends."""

    kappa: float = Field(0.0, ge=-8, le=8, description="weights times (n_k / M)^kappa: above 0, weak clients count less")
    density: float = Field(1.0, gt=0, le=1, description="rho: share of the numbers of its bases that a client sends, at most")
    upload: float | None = Field(
        None, gt=0, description="U: numbers that a client sends at most, in those of one base: rho_k = min(rho, U / n_k)"
    )


class SHEFL(SplitMix):
    """Split-Mix with weights by capacity and sparse changes."""

    Params: ClassVar[type[MethodParams]] = SHEFLParams
    info = MethodInfo(
        title="SHEFL",
        paper="arXiv 2508.08552",
        adapts="models of the ensemble that it trains; numbers it sends",
        trains="the adapter experts that are its models (dense foundation)",
        sends="of each model what it changed most",
        weighs="data size times (models / M)^kappa, among those who train the model",
        completion="all formulas: rotation, weights, top-k",
    )

    def check_config(self, config: Config) -> None:
        super().check_config(config)
        sparse = self.params.density < 1 or self.params.upload is not None
        if sparse and config.local.drift not in ("none", "fedprox"):
            kept = "control variates" if config.local.drift == "scaffold" else "dual variables"
            raise UserError(
                f"local.drift: {config.local.drift}: its {kept} are of whole changes, and clients of {self.info.title} send "
                "the largest parts of theirs; use none or fedprox, or method.density=1 and method.upload=null"
            )

    def assign(self, client: Client, context: RoundContext) -> Assignment:
        assignment, density = super().assign(client, context), self.density(client)
        return assignment if density >= 1 else replace(assignment, density=density)

    def density(self, client: Client) -> Fraction:
        """rho_k."""
        # Of decimal numbers as they were written, and in thirds that are thirds: how many numbers are sent is rounded up.
        most, upload = Fraction(str(self.params.density)), self.params.upload
        return most if upload is None else min(most, Fraction(str(upload)) / client.experts)

    def weights(self, spec: BlockSpec, update: ClientUpdate, data_share: float) -> np.ndarray:
        capacity = update.client.experts / self.facts.num_experts
        return super().weights(spec, update, data_share * capacity**self.params.kappa)
