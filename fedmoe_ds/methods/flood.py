"""FLood: weights against out-of-distribution data, of samples in a client and of clients in the mean (arXiv 2602.01039).

Legend: N targets of one local step, V vocabulary or classes; k a client, t a round from 1.

READ (the abstract in public readings): locally, pseudo out-of-distribution samples get another weight; globally, clients are
averaged by how far their models take their own data for known. CODE (LingAndZero/FLood @ 8d0cec38) gives the formulas:

    score     s(z) = T_e logsumexp(z / T_e)                          minus the energy of logits z: high is in distribution
    loss      mean_n w_n CE_n,   w_n = W(t) where s_n is below the q-quantile (interpolation "lower") of its batch, else 1
    released  W(t) = 2a (sig(10 (t - T/2)) - sig(-5T)) / (sig(5T) - sig(-5T))            with a = 50, T = 1000
    cosine    W(t) = a (1 - cos(pi t / T))                           an alternative that is commented out there
    server    weight_k proportional to n_k / sum n + alpha s_k / sum s,                  s_k = mean score of k's own samples

The server's weights are two means, each normalised by itself, mixed 1 : alpha: no client needs to know the others' scores.

COMPLETION:
- `schedule: cosine` with a = 1 is the default. The released one is a step: 0 for the first half of the rounds and 2a after it,
  so that 70 % of every batch do not count at all and later count a hundredfold. `constant` is W = a, for ablations.
- s_k is the mean over the targets of the client's last local epoch, as they are trained on, and no further pass after it.
- s_k below zero counts as zero: a share must not be negative. Where all are zero, clients weigh by their data alone.
- T is the run's number of rounds (`horizon: null`): the released 1000 of 2000 would leave W near 0 in a short run. A run keeps
  the number: with more rounds later W stays at its end, as it does after T.
- A sample is a target: the class of an image, or a token of a text.

Limits: a number that is added to all logits changes s_k and so the weights, and nothing that the model says. The quantile is
that of a whole step, so micro-batches are refused; all logits of a client's step are held at once. Reported training losses
are plain cross-entropy.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedmoe_ds.methods import (
    Assignment,
    BlockSpec,
    Client,
    ClientUpdate,
    Config,
    Method,
    MethodInfo,
    MethodParams,
    Objective,
    Predictions,
    RoundContext,
    Weighing,
)

SCORE, SCORED = "score", "scored"
"""Sums over a client's last local epoch: scores of its targets, and how many these are."""


class FLoodParams(MethodParams):
    """FLood's weights; the released ones are schedule released, amplitude 50, horizon 1000."""

    alpha: float = Field(0.5, ge=0, description="share of the mean by scores beside 1 for that by data; 0: FedAvg's mean")
    quantile: float = Field(0.7, ge=0, le=1, description="q: part of a step that counts as pseudo out of distribution; 0: none")
    temperature: float = Field(1.0, gt=0, description="T_e of the score")
    schedule: Literal["cosine", "released", "constant"] = Field("cosine", description="course of W over the rounds")
    amplitude: float = Field(1.0, ge=0, description="a: W ends at 2a (constant: is a)")
    horizon: int | None = Field(None, ge=1, description="T: rounds until W is at its end; null: federation.rounds")

    def idle(self, config: Config) -> dict[str, str]:
        if self.quantile == 0:
            found = dict.fromkeys(("schedule", "amplitude", "horizon"), "with method.quantile=0: every target weighs 1")
            return found if self.alpha else found | {"temperature": "with method.quantile=0 and method.alpha=0"}
        return {"horizon": "with method.schedule=constant"} if self.schedule == "constant" else {}

    def resolved(self, config: Config) -> FLoodParams:
        # Where it does nothing it stays away: a run saves what is resolved, and keys without effect are refused.
        if self.horizon is not None or "horizon" in self.idle(config):
            return self
        return self.model_copy(update={"horizon": config.federation.rounds})


class FLood(Method):
    """Weights from energy scores."""

    Params: ClassVar[type[MethodParams]] = FLoodParams
    info = MethodInfo(
        title="FLood",
        paper="arXiv 2602.01039",
        adapts="active experts k",
        trains="LoRA A and B",
        sends="A, B, mean energy score",
        weighs="data size and score, two means mixed 1 : alpha",
        completion="cosine schedule; scores of the last epoch, at least 0; targets are samples",
    )

    def __init__(self, params: FLoodParams) -> None:
        super().__init__(params)
        # A quantile is that of a whole step.
        self.whole_steps = params.quantile > 0
        self.weighing = Weighing(shares=(1.0, params.alpha)) if params.alpha else Weighing()

    def _weight(self, round_index: int) -> float:
        """W(t)."""
        amplitude, horizon = self.params.amplitude, self.params.horizon
        # Without a schedule, and where no target is weighed, there is none.
        if horizon is None or self.params.schedule == "constant":
            return float(amplitude)
        done = min(round_index, horizon)
        if self.params.schedule == "cosine":
            return float(amplitude * (1.0 - math.cos(math.pi * done / horizon)))
        first, last = _sigmoid(-5.0 * horizon), _sigmoid(5.0 * horizon)
        return float(2.0 * amplitude * (_sigmoid(10.0 * (done - horizon / 2)) - first) / (last - first))

    def sums(self) -> dict[str, tuple[int, ...]]:
        return {SCORE: (), SCORED: ()}

    def objective(self, client: Client, assignment: Assignment, context: RoundContext) -> Objective | None:
        weight = self._weight(context.round)
        return Objective(loss=lambda given: self.loss(given, weight))

    def loss(self, given: Predictions, weight: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of w_n CE_n; and, in the last local epoch, the scores."""
        score_N = self.scores(given.logits_NV)
        weight_N = torch.where(self.below(score_N), weight, 1.0)
        # In steps before the last epoch nothing is added, under the same names.
        counted = float(given.step.last_epoch)
        sums = {SCORE: counted * score_N.double().sum(), SCORED: torch.full_like(score_N, counted).double().sum()}
        return (weight_N * given.nll_N).sum(), sums

    @torch.no_grad()
    def scores(self, logits_NV: Tensor) -> Tensor:
        """s(z) of every target."""
        temperature: float = self.params.temperature
        if temperature == 1.0:  # no copy of the logits
            return logits_NV.logsumexp(-1)
        return temperature * (logits_NV / temperature).logsumexp(-1)

    def below(self, score_N: Tensor) -> Tensor:
        """Bool: below the quantile of these scores, the floor(q (N - 1))-th of them in order."""
        # The decimal number that the user wrote: 0.7 times 10 is 7, and not a little less.
        place = math.floor(Fraction(str(self.params.quantile)) * (len(score_N) - 1))
        return score_N < score_N.sort().values[place]

    def weightings(self, spec: BlockSpec, update: ClientUpdate, data_share: float) -> list[np.ndarray]:
        by_data = self.weights(spec, update, data_share)
        if not self.params.alpha:
            return [by_data]
        return [by_data, np.full_like(by_data, confidence(update))]


def confidence(update: ClientUpdate) -> float:
    """s_k, or zero where it is negative."""
    score, scored = (float(update.observed[name]) for name in (SCORE, SCORED))
    return max(score / scored, 0.0) if scored else 0.0


def _sigmoid(x: float) -> float:
    # By tanh: exp(-x) would overflow at the ends of a long schedule.
    return 0.5 * (1.0 + math.tanh(0.5 * x))
