"""EWWA-FL: element-wise weights aggregation for federated learning (Hu, Ren, Hu, Deng, Xie; arXiv 2404.15919).

Legend: c a client, x what it received, x_c what it returned.

READ (the paper's text in a public reading), for every element of the model by itself, with Adam's moments over the rounds:

    g_c = x - x_c
    m_c <- beta1 m_c + (1 - beta1) g_c           v_c <- beta2 v_c + (1 - beta2) g_c^2           mhat, vhat: bias-corrected
    b_c = alpha mhat_c / sqrt(vhat_c + eps)      p_c = exp(b_c) / sum_k exp(b_k)                x <- sum_c p_c x_c

CODE (Rand2AI/EWWA-FL @ 92906984) does something else: one (m, v) for all clients, updated client after client, and
p_c = log(b_c - min b + 1) normalised. That depends on the order of clients, so the stated form is what runs here.

COMPLETION:
- Moments stay with their client, two numbers for each that it trains: its state is twice as large as what it sends. Those of a
  client that was away are kept as they are; its bias correction counts its own participations.
- All participants count alike but for exp(b_c), whatever their data size, as stated. A client that routed no row to an expert
  returns what it received: g_c = 0 there.
- b_c is bounded by alpha (1 - beta1) / sqrt((1 - beta2) (1 - beta1^2 / beta2)) (Cauchy-Schwarz): 7.3 alpha with the defaults.
  What would leave float32's range is refused.

Limits: clients that move an element down (g_c > 0) weigh more than those that move it up; the rule is not symmetric under
x -> -x. In a client's first round b_c = alpha g_c / sqrt(g_c^2 + eps), which knows the sign alone where |g_c| is far above
sqrt(eps).
"""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedmoe_ds.methods import (
    BlockSpec,
    ClientUpdate,
    ClientView,
    Config,
    Method,
    MethodInfo,
    MethodParams,
    UserError,
    Weighing,
    remembered_block,
    shared_blocks,
)

FIRST, SECOND = "ewwa-first", "ewwa-second"
# Personal, so that a client that is trained on another rank, or in another start, brings it along.
ROUNDS = BlockSpec("ewwa.rounds", (-1,), (1,), personal=True, trained=False)
LARGEST_EXPONENT = 40.0
"""exp(40) = 2^58; float32 ends at 2^128."""


class EWWAParams(MethodParams):
    """EWWA-FL's temperature, and Adam's constants."""

    alpha: float = Field(1.0, ge=0, description="0: equal weights")
    beta1: float = Field(0.9, ge=0, lt=1, description="of the first moment")
    beta2: float = Field(0.999, gt=0, lt=1, description="of the second moment; beta1^2 < beta2")
    eps: float = Field(1e-8, gt=0, description="added under the root")

    def idle(self, config: Config) -> dict[str, str]:
        none = "with method.alpha=0: all elements weigh the same"
        return {} if self.alpha else dict.fromkeys(("beta1", "beta2", "eps"), none)


class EWWAFL(Method):
    """Every element of every client has a weight of its own."""

    Params: ClassVar[type[MethodParams]] = EWWAParams
    info = MethodInfo(
        title="EWWA-FL",
        paper="arXiv 2404.15919",
        adapts="active experts k",
        trains="LoRA A and B",
        sends="A, B, and a weight for each of their elements",
        weighs="softmax over clients of Adam's direction, per element",
        completion="the stated form, not the code's; moments personal, corrected by own participations",
    )
    weighing = Weighing(elements=True)

    def check_config(self, config: Config) -> None:
        alpha, beta1, beta2 = self.params.alpha, self.params.beta1, self.params.beta2
        if beta1**2 >= beta2:
            raise UserError(f"method.beta2: {beta2}: must be above beta1^2 = {beta1**2:g}, or weights have no bound; raise it")
        largest = alpha * (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1**2 / beta2))
        if largest > LARGEST_EXPONENT:
            raise UserError(
                f"method.alpha: {alpha}: weights would reach exp({largest:.3g}), and exp({LARGEST_EXPONENT:g}) is the most; "
                f"use {alpha * LARGEST_EXPONENT / largest:.3g} or less"
            )

    def client_state(self, specs: list[BlockSpec]) -> list[BlockSpec]:
        moments = [remembered_block(spec, word) for spec in shared_blocks(specs) for word in (FIRST, SECOND)]
        return [*moments, ROUNDS]

    @torch.no_grad()
    def remember_blocks(self, view: ClientView) -> dict[str, Tensor]:
        """The moments of g_c, and how often the client has taken part."""
        found = {}
        for spec in shared_blocks(view.blocks()):
            first, second = (remembered_block(spec, word).name for word in (FIRST, SECOND))
            g = view.received(spec) - view.value(spec)
            # Products and sums by themselves: a fused operation would round otherwise at the end of a vector.
            found[first] = view.client_state[first] * self.params.beta1 + g * (1 - self.params.beta1)
            found[second] = view.client_state[second] * self.params.beta2 + g * g * (1 - self.params.beta2)
        if False in view.slots:
            found[ROUNDS.name] = view.client_state[ROUNDS.name] + 1
        return found

    def weights(self, spec: BlockSpec, update: ClientUpdate, data_share: float) -> np.ndarray:
        return super().weights(spec, update, 1.0)

    @torch.no_grad()
    def element_weights(self, spec: BlockSpec, view: ClientView, update: ClientUpdate) -> Tensor:
        """exp(b_c); its softmax over clients is what the mean makes of it."""
        first, second = (update.remembered[remembered_block(spec, word).name].double() for word in (FIRST, SECOND))
        # The state in `view` is still that of before the round.
        rounds = float(view.client_state[ROUNDS.name]) + 1
        mhat, vhat = first / (1 - self.params.beta1**rounds), second / (1 - self.params.beta2**rounds)
        return exponential(mhat * self.params.alpha / torch.sqrt(vhat + self.params.eps)).float()


def exponential(x: Tensor) -> Tensor:
    """exp of float64 within 40 of zero, to 5e-14, from sums and products alone.

    A library's exp may take another loop at the end of a vector, and round otherwise there: a weight would depend on how
    many experts its rank holds.
    """
    # exp(x) = exp(x / 2^7)^(2^7), and the series of a small number. Squaring doubles a relative error: 128 times that of the
    # series (2e-16 at most), and 127 roundings.
    small = x * 2.0**-7
    result = torch.ones_like(small)
    for n in range(14, 0, -1):
        result = result * small * (1.0 / n) + 1.0
    for _ in range(7):
        result = result * result
    return result
