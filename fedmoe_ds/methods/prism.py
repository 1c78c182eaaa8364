"""PRISM: samples with concentrated gradients are trained by reinforcement, the others by imitation (arXiv 2601.07224).

Legend: B samples of one client, n parts of the model; i a client, t a round from 1.

READ (the abstract and public notes; no public code was found): the gradients of a sample are looked at without an update, and
their concentration over the parts of the model is measured (the Gini coefficient, and relatives). Samples of concentrated
gradients go to reinforcement learning (RL), of diffuse ones to supervised fine-tuning (SFT); where the line is, the data's own
distribution says, and no threshold. It is no federated system.

    G_b = sum_j (2 j - n - 1) g_(j) / (n sum_j g_j),    g_j = ||d CE_b / d part j||_F, in rising order

COMPLETION:
- Parts are the trained modules of every layer (and expert): a LoRA pair is one, and so is a matrix that is trained itself.
- Within each client, the share rho of the samples with the largest G goes to RL: at least one, and not all, where rho is
  neither 0 nor 1. No number of a sample leaves its client; the server knows the mean of each client.
- A client is probed once, sample by sample, before the first step of the round in which it takes part first. It trains on all
  of its samples by cross-entropy there: batches are known before a probe is. From then on it trains on one part alone.
- SFT comes first. The last rho T of the T rounds are RL, rounded, a half up: rounds are shared as samples are, and a sample
  that is RL is gone over in about rho T of them, another in (1 - rho) T. A run keeps T (`horizon`); in rounds beyond it RL
  goes on.
- RL has a reward that can be verified: 1 where the answer is right. An answer is a target: the class of an image, or a token of
  a text after the right ones. Its expected reward is p(y), so the expected policy gradient is exact and needs no sample:

    grad -p(y) = p(y) grad CE

  RL and SFT differ by one factor per target here, and a baseline changes nothing in expectation. So this form says how samples
  are *routed*, and nothing about reinforcement learning at large.
- A device would draw `rollouts` answers per sample: so many forward passes of every row count in FLOPs, virtual time and
  energy, beside those of training. This machine does not make them. The probe counts in the same way, and is made.
- A client weighs its data size times the share of samples that it used. `route: random` and `reversed` (the most diffuse
  gradients to RL) are its controls; the first probes nothing, as rho = 1 does, which parts nothing.

Limits. A client with one sample has no parts: it trains on it by cross-entropy in all rounds. Where rho T is below a half no
round is RL, and samples that would be are trained on in the first round alone. A probe takes a forward and a backward pass of
every sample alone. Clients keep a number per sample, as many as the client with most samples has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
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
    PlanContext,
    Predictions,
    RoundContext,
    RoundPlan,
    generator,
)

GINI = "prism.gini"
PROBE, IMITATE, REINFORCE = "probe", "imitate", "reinforce"
"""What a client is told of a round: to be probed and train on everything, or which part of its samples it trains on."""


class PRISMParams(MethodParams):
    """How samples are parted; no value of the paper's is known."""

    rho: float = Field(0.3, ge=0, le=1, description="share of a client's samples, and of the rounds, that are RL; 0: FedAvg")
    route: Literal["concentrated", "random", "reversed"] = Field(
        "concentrated",
        description="which samples are RL: those of the most concentrated gradients, drawn ones, or the most diffuse",
    )
    rollouts: int = Field(8, ge=0, description="answers that a device draws per RL sample: forward passes that are counted")
    horizon: int | None = Field(None, ge=1, description="T: rounds, the last rho T of which are RL; null: federation.rounds")

    def idle(self, config: Config) -> dict[str, str]:
        if self.rho == 0:
            return dict.fromkeys(("route", "rollouts", "horizon"), "with method.rho=0: all is SFT")
        return {"route": "with method.rho=1: all samples are RL"} if self.rho == 1 else {}

    def resolved(self, config: Config) -> PRISMParams:
        if self.horizon is not None or self.rho == 0:
            return self
        return self.model_copy(update={"horizon": config.federation.rounds})


class PRISM(Method):
    """Samples in two parts, by a probe of their gradients."""

    Params: ClassVar[type[MethodParams]] = PRISMParams
    info = MethodInfo(
        title="PRISM",
        paper="arXiv 2601.07224",
        adapts="active experts k",
        trains="what the configuration trains, on a part of the samples",
        sends="adapters, mean Gini coefficient",
        weighs="data size times the share of samples used",
        completion="Gini over modules; share rho within a client; SFT rounds, then RL; exact gradient of an expected reward",
    )
    # What it minimises is made of `nll_N`.
    logit_copies: ClassVar[int] = 0

    def __init__(self, params: PRISMParams) -> None:
        super().__init__(params)
        self.parts = params.rho > 0
        # Where all samples are RL, nothing parts them.
        self.probes = 0 < params.rho < 1 and params.route != "random"

    # What is known of clients, by the server and by themselves

    def memory(self) -> dict[str, tuple[int, ...]]:
        return {"gini": ()} if self.parts else {}

    def memorise(self, update: ClientUpdate) -> dict[str, np.ndarray]:
        if update.memory:
            return dict(update.memory)
        return {"gini": np.array(0.0 if update.probed is None else update.probed.numbers.mean())}

    def client_state(self, specs: list[BlockSpec]) -> list[BlockSpec]:
        own = BlockSpec(GINI, (-1,), (self.facts.sequences,), personal=True, trained=False)
        return [own] if self.probes else []

    def remember(self, update: ClientUpdate) -> dict[str, Tensor]:
        if update.probed is None:
            return {}
        padded = torch.zeros(1, self.facts.sequences)
        padded[0, : len(update.probed.numbers)] = torch.from_numpy(update.probed.numbers)
        return {GINI: padded}

    def reduce_probe(self, squares: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
        """The Gini coefficient of one sample's gradient."""
        modules: dict[str, NDArray[np.float64]] = {}
        for name, square in squares.items():
            # Both halves of a LoRA pair have one stem.
            stem = name.rpartition(".")[0] or name
            modules[stem] = modules[stem] + square if stem in modules else square
        return np.array(gini(np.sqrt(np.concatenate([square.ravel() for square in modules.values()]))))

    # Which part a client trains on

    def reinforces(self, round_index: int) -> bool:
        """Whether a round is one of the last rho T."""
        # The decimal number that the user wrote: 0.3 times 5 rounds are a half more than one, and count as two.
        count = math.floor(Fraction(str(self.params.rho)) * self.params.horizon + Fraction(1, 2))
        return bool(round_index > self.params.horizon - count)

    def reinforced(self, client: Client) -> int:
        """How many of the client's samples are RL."""
        rho, samples = Fraction(str(self.params.rho)), client.sequences
        if rho == 1:
            return samples
        return min(max(math.floor(rho * samples + Fraction(1, 2)), 1), samples - 1)

    def plan(self, context: PlanContext) -> RoundPlan:
        if not self.parts:
            return RoundPlan(context.drawn)
        told = {client.index: self._part(client, context) for client in context.drawn}
        return RoundPlan([self._planned(client, told[client.index]) for client in context.drawn], told)

    def _part(self, client: Client, context: PlanContext) -> str:
        if client.index not in context.memories:
            return PROBE
        return REINFORCE if self.reinforces(context.round) and self.reinforced(client) else IMITATE

    def _planned(self, client: Client, part: str) -> Client:
        count = self.reinforced(client)
        if part == PROBE:
            return replace(client, probed=client.sequences if self.probes else 0)
        if part == REINFORCE:
            return replace(client, used=count, rollouts=self.params.rollouts)
        return replace(client, used=client.sequences - count)

    def assign(self, client: Client, context: RoundContext) -> Assignment:
        assignment = super().assign(client, context)
        if context.plan is None:
            return assignment
        if context.plan == PROBE:
            passes = tuple(np.arange(client.sequences)[:, None]) if self.probes else None
            return replace(assignment, probe=passes)
        chosen = np.zeros(client.sequences, dtype=bool)
        chosen[self._order(client, context)[: self.reinforced(client)]] = True
        if context.plan == IMITATE:
            chosen = ~chosen
        return replace(assignment, samples=np.flatnonzero(chosen))

    def _order(self, client: Client, context: RoundContext) -> NDArray[np.int64]:
        """The client's samples, those first that are RL first."""
        if not self.probes:
            return generator(self.facts.seed, "prism", client.index).permutation(client.sequences)
        known = context.client_state[GINI][0, : client.sequences].numpy()
        # Stable: of equal ones the first.
        return np.argsort(known if self.params.route == "reversed" else -known, kind="stable")

    def objective(self, client: Client, assignment: Assignment, context: RoundContext) -> Objective | None:
        return Objective(loss=expected_failure) if context.plan == REINFORCE else None

    def weights(self, spec: BlockSpec, update: ClientUpdate, data_share: float) -> np.ndarray:
        client = update.client
        return super().weights(spec, update, data_share * (client.trained_sequences / client.sequences))


def gini(value_N: NDArray[np.float64]) -> float:
    """The Gini coefficient of numbers that are not negative: 0 of equal ones, 1 - 1 / N where one has everything."""
    # Exact sums: which sample is the more concentrated must not follow from an order of adding.
    total, count = math.fsum(value_N), len(value_N)
    if total == 0.0:
        return 0.0
    rank_N = 2.0 * np.arange(1, count + 1) - count - 1
    return math.fsum(rank_N * np.sort(value_N)) / (count * total)


def expected_failure(given: Predictions) -> tuple[Tensor, dict[str, Tensor]]:
    """Minus the expected reward, summed over targets."""
    return -(-given.nll_N).exp().sum(), {}
