"""OTA-FFL: fair federated learning by over-the-air computation (Hamidi, Bereyhi, Asaad, Poor; arXiv 2501.03392).

Legend: K participants, L layers, E experts.

READ (abstract): fairness as a multi-objective problem; a modified Chebyshev scalarisation gives adaptive weights of the local
losses; transmit scalars and de-noising scalar are optimal and in closed form; a sum over the air through a fading
multiple-access channel, unbiased. NOT FOUND: the formulas. COMPLETION:

    weights   lambda = argmax sum_k lambda_k f_k   over the simplex with |lambda_k - p_k| <= epsilon,  p_k = |D_k| / sum_K |D_k|
    channel   h_k = |z_k|, Rayleigh, one draw per (seed, round, client)
    send      b_k delta_k / s_k with b_k = sqrt(eta) lambda_k s_k / h_k, s_k = the RMS of delta_k; b_k^2 <= P0 for everybody:
              eta = min_k P0 h_k^2 / (lambda_k s_k)^2
    receive   sum_k lambda_k delta_k + n / sqrt(eta),   n ~ N(0, sigma^2) per element

so that the server sees an unbiased mean with the variance sigma^2 / eta. epsilon = 0 gives FedAvg's weights, epsilon = 1 all
weight to the highest loss. The argmax moves mass from the lowest losses to the highest until they meet; clients of equal losses
are treated alike. f_k is the loss of the client's first local step in its last participation, so it is one participation old; a
client never seen counts with the mean of those that were (with nobody seen all weights are p). P0 / sigma^2 is the SNR of a
client whose channel has unit gain, so P0 itself does not matter. The scales s_k reach the server aside and without error, as
control variates do where there are any. The simulation takes the exact mean and adds n / sqrt(eta), once, after the sum, drawn
for each adapter tensor by its own name: without noise the mean keeps its bits. A client that is kept out sends nothing, and the
others' weights are normalised. Limits: no truncation, so one client in a deep fade makes the whole round noisy; the channel
state is known without error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from fedmoe_ds.methods import (
    BlockSpec,
    ClientUpdate,
    ClientView,
    MeanContext,
    Method,
    MethodInfo,
    MethodParams,
    PlanContext,
    RoundPlan,
    TensorRule,
    counts_of,
    fading,
    generator,
)

Floats = NDArray[np.float64]


class OTAParams(MethodParams):
    """How far weights may go from data sizes, and how loud the channel is."""

    epsilon: float = Field(0.1, ge=0, le=1, description="most that a client's weight may differ from its share of the data")
    snr_db: float | None = Field(15.0, ge=-60, le=300, description="P0 / sigma^2; null: no noise")


@dataclass(frozen=True)
class Part:
    """A participant's part of the plan: its weight lambda, and the same over its share of the data."""

    weight: float
    factor: float


def chebyshev_weights(share_K: Floats, loss_K: Floats, epsilon: float) -> Floats:
    """The point of the simplex within `epsilon` of the shares (in every place) with the largest weighted loss.

    Among several such points the one that treats equal losses alike, and moves nothing where all are equal.
    """
    levels = [loss_K == value for value in np.unique(loss_K)]
    give_K, take_K = np.minimum(share_K, epsilon), np.minimum(1.0 - share_K, epsilon)
    given, taken = [0.0] * len(levels), [0.0] * len(levels)
    room = [(float(give_K[level].sum()), float(take_K[level].sum())) for level in levels]
    low, high = 0, len(levels) - 1
    # From the lowest loss to the highest: a swap of any two moves that this order does not make would gain nothing.
    while low < high:
        moved = min(room[low][0] - given[low], room[high][1] - taken[high])
        given[low], taken[high] = given[low] + moved, taken[high] + moved
        # One of the two has no room left now, to the bit: it is what `moved` was the rest of.
        if room[high][1] - taken[high] <= 0.0:
            high -= 1
        else:
            low += 1
    weight_K = share_K.copy()
    for level, (gives, takes), out, into in zip(levels, room, given, taken, strict=True):
        weight_K[level] -= give_K[level] * (out / gives if gives > 0.0 else 0.0)
        weight_K[level] += take_K[level] * (into / takes if takes > 0.0 else 0.0)
    return weight_K


def de_noising(weight_K: Floats, scale_K: Floats, amplitude_K: Floats, power: float) -> float:
    """eta: the largest under which nobody exceeds the power limit; infinite where nobody has anything to say."""
    loudest = float((weight_K * scale_K / amplitude_K).max())
    return power / loudest**2 if loudest > 0.0 else math.inf


class OTAFFL(Method):
    """Weights towards clients with high losses, and a sum over a noisy channel."""

    Params: ClassVar[type[MethodParams]] = OTAParams
    info = MethodInfo(
        title="OTA-FFL",
        paper="arXiv 2501.03392",
        adapts="aggregation weights",
        trains="what the configuration trains",
        sends="adapters over the air, loss, scale",
        weighs="Chebyshev weights within epsilon of data size",
        completion="box and greedy weights; zero forcing; addressed noise after the mean",
    )

    def memory(self) -> dict[str, tuple[int, ...]]:
        return {"loss": (), "weight": (), "scale": ()}

    def blocks(self, specs: list[BlockSpec]) -> list[BlockSpec]:
        # A mean over elements needs their number, which measures of a (layer, expert) do not tell.
        self.elements = {spec.name: math.prod(spec.item) for spec in specs}
        return specs

    def plan(self, context: PlanContext) -> RoundPlan:
        samples_K = counts_of(context.drawn, "samples").astype(np.float64)
        share_K = samples_K / samples_K.sum()
        weight_K = chebyshev_weights(share_K, self._losses(context), self.params.epsilon)
        parts = {
            client.index: Part(weight, weight / share)
            for client, weight, share in zip(context.drawn, weight_K.tolist(), share_K.tolist(), strict=True)
        }
        return RoundPlan(context.drawn, parts)

    def _losses(self, context: PlanContext) -> Floats:
        """The remembered losses; the mean of them for clients that nobody has seen."""
        known = [context.memories.get(client.index) for client in context.drawn]
        losses = [math.nan if memory is None else float(memory["loss"]) for memory in known]
        seen = [loss for loss in losses if not math.isnan(loss)]
        mean = math.fsum(seen) / len(seen) if seen else 0.0
        return np.array([mean if math.isnan(loss) else loss for loss in losses])

    def measure(self, view: ClientView) -> dict[str, Tensor]:
        """Sums of squares of what the client sends, per (layer, expert) or layer."""
        found = {}
        for spec in view.blocks():
            if not spec.personal:
                change = view.value(spec).double() - view.received(spec).double()
                found[spec.name] = change.square().flatten(2 if spec.expert else 1).sum(-1)
        return found

    def memorise(self, update: ClientUpdate) -> dict[str, np.ndarray]:
        assert update.losses is not None, "a client's memory is made where its losses are known"
        sums = {name: math.fsum(np.ravel(values)) for name, values in update.measured.items()}
        count = sum(self.elements[name] * values.size for name, values in update.measured.items())
        scale = math.sqrt(math.fsum(sums.values()) / count)
        return {"loss": np.array(update.losses[0]), "weight": np.array(update.plan.weight), "scale": np.array(scale)}

    def weights(self, spec: BlockSpec, update: ClientUpdate, data_share: float) -> np.ndarray:
        # A factor on FedAvg's weight, and 1 where epsilon is 0: only the ratio of weights counts in a mean.
        weights: np.ndarray = super().weights(spec, update, data_share) * update.plan.factor
        return weights

    def after_mean(self, context: MeanContext) -> TensorRule | None:
        if self.params.snr_db is None:
            return None
        deviation = self._noise(context, self.params.snr_db)
        if deviation == 0.0:
            return None

        def receive(key: str, mean: Tensor) -> Tensor:
            # By the tensor's own name, which knows layer and global expert: whoever holds it draws the same.
            noise = generator(self.facts.seed, "over-the-air", context.round, key).standard_normal(tuple(mean.shape))
            return (mean.double() + deviation * torch.from_numpy(noise).to(mean.device)).float()

        return receive

    def _noise(self, context: MeanContext, snr_db: float) -> float:
        """The standard deviation of what the channel adds to an element of the mean: sigma / sqrt(eta)."""
        if not context.memories:
            return 0.0
        sent = sorted(context.memories.items())
        weight_K, scale_K = (np.array([float(memory[name]) for _, memory in sent]) for name in ("weight", "scale"))
        amplitude_K = np.sqrt(fading(self.facts.seed, context.round, [client for client, _ in sent]))
        eta = de_noising(weight_K / math.fsum(weight_K), scale_K, amplitude_K, power=1.0)
        return 10.0 ** (-snr_db / 20.0) / math.sqrt(eta)
