"""UB-SMoE: even use of experts under unequal budgets, gradients for those that are not used (Tran et al.; arXiv 2605.16690).

Legend: L layers, E = M experts of the model.

READ (abstract and public readings of the paper; no public code was found). A client of budget beta_c activates K_c =
floor(K_max beta_c) experts. Dynamic modulated routing: with the router's logits s = W_r x, the candidates T are the N_p experts
with the largest s, and

    m_i = s_i + phi_i for i in T, else s_i;     p = softmax(m);     the K_c best are activated
    ut_i = sum_c p_c a_{c,i} / n_c;     u* = Kbar / M;     phit_i = tanh(u* / (ut_i + eps) - 1)

with a_{c,i} the rows that expert i served of the client's n_c tokens; phi follows phit with momentum zeta, and is kept within a
range. A universal pseudo-gradient is built for experts that a token did not activate, from the router's probabilities and the
gradients of the activated experts, scaled by the sparsity rho_c, which grows as K_c / M falls. Everything is averaged by p_c.

COMPLETION. In none of the readings are the formula of the pseudo-gradient, rho_c, zeta, eps, the range and the paper's N_p but
for "2", which K_max <= N_p contradicts. Here
- N_p is K_max + 2 unless it is given, and experts are activated among the candidates alone: a phi below zero does not let in
  experts that the router has put behind them;
- p_c in ut is the client's share of the round's tokens, so that ut_i is the share of them that expert i served, and u* the
  mean of ut over experts: sum_i ut_i = sum_c p_c K_c;
- phi <- zeta phi + (1 - zeta) phit, clipped to [-bound, bound], is computed by the server, once per round; it begins at zero,
  goes to the clients with the model, and holds in an evaluation as well. phit itself is above tanh(-1) = -0.76 and below 1. The
  paper's phi is learnt as well and has a penalty for what leaves the range; this one cannot leave it;
- rho_c = 1 - K_c / M, and in a local step an expert's gradient in every block becomes

      g_i + rho_c q_i G,     G = sum_{j in A} pbar_j g_j / sum_{j in A} pbar_j

  with pbar the mean of p over the step's tokens, A the experts that served some of them, and q_i the mean over the tokens of
  p_i where the token did not activate i (`pseudo_gradient: tokens`): the token-wise rule with its gradients taken to be alike,
  so that no product of a token with an expert that it did not use is made. `batch` gives it to experts alone that no token of
  the step has activated, with pbar_i for q_i; in steps of many tokens there are few of these.
`routing: plain` and `pseudo_gradient: none` are the paper's ablations; both together are FedIT with a budget of active experts,
which the paper compares with as A3SMoE.

Limits. AdamW divides the size of a gradient out: an expert that is given nothing else moves as far in a step as any other. The
LoRA matrices A of two experts begin at different values, so that a mean of their gradients of B mixes bases. The server's M
numbers per layer are not counted as traffic. FFT-MoE's global target (`fft_moe.py`) is about the same share of use: there a
loss pulls routers to experts below the mean, here the choice itself is moved. A client that starts late (`devices.aggregation:
buffered`) has the adapters of its start and the present phi: past ones are not kept.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedmoe_ds.methods import (
    ROUTER_BIAS,
    Assignment,
    BlockSpec,
    Client,
    Config,
    MeanContext,
    Method,
    MethodInfo,
    MethodParams,
    ModelFacts,
    PseudoGradient,
    RoundContext,
    UserError,
)

FURTHER = 2
"""Candidates beyond the model's top-k."""


class UBSMoEParams(MethodParams):
    """Modulated routing, and pseudo-gradients; the paper's values are not known."""

    routing: Literal["modulated", "plain"] = Field("modulated", description="whether phi moves the choice of experts")
    candidates: int | None = Field(None, ge=1, description="N_p: experts that phi reaches; null: two more than the top-k")
    momentum: float = Field(0.9, ge=0, lt=1, description="zeta")
    epsilon: float = Field(1e-3, gt=0, description="eps, added to the share of tokens that an expert has served")
    bound: float = Field(1.0, gt=0, description="largest absolute value of phi")
    pseudo_gradient: Literal["tokens", "batch", "none"] = Field(
        "tokens", description="whose router probability counts: of tokens, or of whole steps, that did not use the expert"
    )

    def idle(self, config: Config) -> dict[str, str]:
        keys = ("candidates", "momentum", "epsilon", "bound") if self.routing == "plain" else ()
        return dict.fromkeys(keys, "with method.routing=plain: there is no phi")


class UBSMoE(Method):
    """Modulated routing towards even use, and pseudo-gradients."""

    Params: ClassVar[type[MethodParams]] = UBSMoEParams
    info = MethodInfo(
        title="UB-SMoE",
        paper="arXiv 2605.16690",
        adapts="active experts k",
        trains="experts (LoRA or whole), also those that tokens did not use",
        sends="what it trains, activations a",
        weighs="data size",
        completion="pseudo-gradient per step, rho = 1 - k / M; N_p = top-k + 2; phi by the server alone; shares in tokens",
    )
    needs = frozenset({"experts"})

    def check_config(self, config: Config) -> None:
        moe = config.adapters.moe
        if moe is not None and moe.zero and self.params.routing == "modulated":
            raise UserError(
                f"adapters.moe.zero: {moe.zero}: phi moves routers by how much experts are used, and these are not there to be "
                "used; use 0, or method.routing=plain"
            )

    def check(self, facts: ModelFacts) -> None:
        told = self.params.candidates
        if told is not None and not facts.top_k <= told <= facts.num_experts:
            raise UserError(
                f"method.candidates: {told}: a token of this model activates up to {facts.top_k} of {facts.num_experts} "
                f"experts; use {facts.top_k} to {facts.num_experts}, or null"
            )
        if self.params.routing == "modulated":
            self.candidates = min(facts.top_k + FURTHER, facts.num_experts) if told is None else told

    def blocks(self, specs: list[BlockSpec]) -> list[BlockSpec]:
        if self.params.routing == "plain":
            return specs
        # Dense and not per expert: a router is on its client's home rank, whoever holds the experts.
        return [*specs, BlockSpec(ROUTER_BIAS, self.facts.layers, (self.facts.num_experts,), decay=False, trained=False)]

    def assign(self, client: Client, context: RoundContext) -> Assignment:
        assignment, rho = super().assign(client, context), 1.0 - client.cap / self.facts.num_experts
        if self.params.pseudo_gradient == "none" or rho <= 0:
            return assignment
        return replace(assignment, pseudo=PseudoGradient(rho, self.params.pseudo_gradient))

    def renew(self, spec: BlockSpec, value: Tensor, context: MeanContext) -> Tensor:
        """phi [L, E] of the next round."""
        # Where nobody was trained in the round, nobody's use of experts is known.
        if spec.name != ROUTER_BIAS or context.tokens == 0:
            return value
        # Float64 and rounded once: every rank computes the same numbers, and none is lost on the way.
        now_LE = value.cpu().numpy().astype(np.float64)
        zeta, bound = self.params.momentum, self.params.bound
        next_LE = zeta * now_LE + (1.0 - zeta) * wanted(context.counts_LE / context.tokens, self.params.epsilon)
        return torch.from_numpy(next_LE.clip(-bound, bound)).to(value.dtype)


def wanted(used_LE: np.ndarray, epsilon: float) -> np.ndarray:
    """phit [L, E]: above zero where an expert served fewer tokens than the mean, of `used_LE` the share that each served."""
    target_L1 = used_LE.mean(1, keepdims=True)
    wanted_LE: np.ndarray = np.tanh(target_L1 / (used_LE + epsilon) - 1.0)
    return wanted_LE
