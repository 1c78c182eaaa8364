"""FedBE: clients train further layers, each some of them, and the model stays as it is (arXiv 2506.05977).

Legend: N layers of the expanded model, G of them further ones (blocks); i a client.

    S_i: |S_i| blocks, by the client's tier          the others run forward, with the server's values
    w_b <- sum_{i: b in S_i} p_i w_b^i / sum_{i: b in S_i} p_i,    p_i = |D_i| / sum |D|

READ (abstract, introduction): the foundation is expanded with trainable transformer blocks, everything original stays frozen;
some of the blocks are given to each client, by its data's distribution and its computing power; only these are trained and
sent. It names forgetting of 11 to 14 % (centrally) and 17 to 27 % (federated) under plain tuning, which this is against. NOT
FOUND: where the blocks stand, the rule that gives them out, the weights of the mean, models and rates; no public code.

COMPLETION:
- `foundation.expand` says where blocks stand and what they begin as: after each of G equal groups of layers a copy of its last
  one whose two output projections are zero, so that it is the identity (the construction of LLaMA-Pro, arXiv 2401.02415).
- `federation.tiers.N.blocks` says |S_i|; without it a tier has the share top_k / K of the blocks, at least one.
- A client is probed on one batch of its own samples, which are drawn, before the first step of the round in which it takes part
  first: S_i are the |S_i| blocks with the largest squared norm of the gradients of their two output projections, of equal ones
  the first, from that round on. At the identity nothing else of a block has a gradient. The server learns S_i alone.
- `allocation: random` (drawn once for each client) and `suffix` (the last ones) are its controls, and probe nothing.
- A block that nobody trains keeps its value. Evaluation is of the whole model at every tier.

Limits. Gradients at the identity are larger nearer to the input: the probe may order blocks by depth alone, whatever a
client's data are (docs/log.md). A client that comes in a later round is probed on what the blocks are by then. All layers
after the first block of S_i take part in the backward pass, and this engine computes gradients of the blocks in between as
well and clears them; FLOPs count those of S_i alone. Blocks are trained whole: a client in flight holds values, gradients and
moments of all G.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedmoe_ds.methods import (
    OUTPUTS,
    OWNED,
    Assignment,
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
    generator,
)


class FedBEParams(MethodParams):
    """How blocks are given to clients; no value of the paper's is known."""

    allocation: Literal["probe", "random", "suffix"] = Field(
        "probe", description="which blocks a client trains: those of the largest gradients on its data, drawn ones, or the last"
    )


class FedBE(Method):
    """A budget buys further layers."""

    Params: ClassVar[type[MethodParams]] = FedBEParams
    info = MethodInfo(
        title="FedBE",
        paper="arXiv 2506.05977",
        adapts="further layers trained",
        trains="some of the layers that `foundation.expand` adds, whole",
        sends="what it trains",
        weighs="data size among those who train the layer",
        completion="where layers are added, as the identity; blocks by a gradient probe of one batch; weights",
    )
    spends = "blocks"

    def check_config(self, config: Config) -> None:
        if config.foundation.expand is None:
            raise UserError(
                "foundation.expand: null: method fedbe trains further layers; say how many, foundation.expand.blocks=2, on a "
                "dense foundation (tiny-llama)"
            )

    # What the server knows of clients: which blocks they have been given

    def memory(self) -> dict[str, tuple[int, ...]]:
        return {"blocks": (len(self.facts.expanded),)}

    def memorise(self, update: ClientUpdate) -> dict[str, np.ndarray]:
        trained_N = update.assignment.trained_N
        held = np.ones(len(self.facts.expanded)) if trained_N is None else trained_N[list(self.facts.expanded)]
        return {"blocks": held.astype(np.float64)}

    def plan(self, context: PlanContext) -> RoundPlan:
        told = {client.index: self.drawn_samples(client) for client in context.drawn if self._asks(client, context)}
        drawn = [
            replace(client, probed=len(told[client.index])) if client.index in told else client for client in context.drawn
        ]
        return RoundPlan(drawn, told)

    def _asks(self, client: Client, context: PlanContext) -> bool:
        """Whether blocks have to be found for a client: who has all needs no probe."""
        return self.params.allocation == "probe" and client.index not in context.memories and not self._whole(client)

    def _whole(self, client: Client) -> bool:
        return client.blocks is None or client.blocks >= len(self.facts.expanded)

    def drawn_samples(self, client: Client) -> NDArray[np.int64]:
        """One batch of its own."""
        count = min(self.facts.local.batch_size, client.sequences)
        drawn = generator(self.facts.seed, "fedbe-probe", client.index).choice(client.sequences, count, replace=False)
        return np.sort(drawn)

    def assign(self, client: Client, context: RoundContext) -> Assignment:
        assignment = super().assign(client, context)
        # A client of all blocks is told nothing: it then is FedAvg's, to the bit. So is the evaluation, which trains nothing.
        if context.round == 0 or self._whole(client):
            return assignment
        if context.plan is not None:
            return replace(assignment, probe=(context.plan,), settle=partial(self._settle, client.blocks or 0))
        if self.params.allocation == "probe":
            return replace(assignment, trained_N=self._layers(context.memory["blocks"] > 0))
        return replace(assignment, trained_N=self._layers(self._given(client)))

    def _given(self, client: Client) -> NDArray[np.bool_]:
        """The client's blocks where no probe says them, bool [G]."""
        count, most = client.blocks or 0, len(self.facts.expanded)
        if self.params.allocation == "suffix":
            return np.arange(most) >= most - count
        order = generator(self.facts.seed, "fedbe-blocks", client.index).permutation(most)
        return np.isin(np.arange(most), order[:count])

    def reduce_probe(self, squares: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
        """Of every block, [G]."""
        first, second = (squares[f"{OWNED}{path}.weight"] for path in OUTPUTS)
        return first + second

    def _settle(self, count: int, numbers: NDArray[np.float64]) -> NDArray[np.bool_]:
        # Stable: of equal ones the first.
        order = np.argsort(-numbers[0], kind="stable")
        return self._layers(np.isin(np.arange(len(order)), order[:count]))

    def _layers(self, given_G: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """As layers of the expanded model, bool [N]."""
        trained_N = np.zeros(self.facts.depth, dtype=bool)
        trained_N[np.array(self.facts.expanded)[given_G]] = True
        return trained_N
