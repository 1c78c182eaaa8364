"""Read-ME: experts made of a dense model's channels, a router that decides before the layers (Cai et al., arXiv 2410.19123).

Legend: T token rows, L layers, E experts.

READ (public notes of the paper): a dense model is refactored into a smaller sparse one by activation sparsity per domain, and
its router is taken out of the layers: one decision per token serves all of them, so that it is known before the layers run
which experts a batch needs. CODE (VITA-Group/READ-ME @ 1df7e684): experts by domain (`foundation/domain_channels.py`), one per
token in all layers with weight one, and permanent channels; the router and its loss (`foundation/pre_gate.py`)

    sum_l  0.75 CE(z_t, argmax s_tl; smoothing 0.5) + 0.25 CE(z_t, softmax s_tl)

with s_tle how many of the largest channels of token t in layer l expert e has; router and experts take turns, 100 and 200
steps, up to five times, each turn at 0.8 of the rate. With weight one, experts give the router no gradient, nor it them.

COMPLETION: the federation. The paper trains in one place. Rounds take turns: every `router_every`-th trains the router, the
others the experts (LoRA or whole), and attention and the head where they are trained; the router's first turn is the
converter's (`foundation.convert.router_steps`), so round 1 is the experts'. An expert is averaged by the rows that clients sent
to it, and one that nobody used keeps its value; the rest by data size. s is counted in the dense model's input projections, on
what reaches a layer of the sparse one: clients hold these projections in router turns. `local.rounds_schedule` can lower the
rate from turn to turn.

Limits. Permanent channels are frozen, as all of the model but experts and what has LoRA; the paper trains the backbone. One
expert per token, as in the code (a public note of the paper says two of eight). A router turn runs the model's backward pass
although nothing of it is trained. The router's products are not counted in FLOPs, but for the gradients of its weights. What a
route that is known early is good for in serving (batches by expert, caches) is not here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np
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
    RoundContext,
    Routing,
    RoutingObserver,
    UserError,
    router_loss,
)


class ReadMEParams(MethodParams):
    """Whose turn it is."""

    router_every: int = Field(2, ge=0, description="every so-many-th round trains the router, the others experts; 0: none does")


class ReadME(Method):
    """Turns of a router before the layers, and of experts averaged by use."""

    Params: ClassVar[type[MethodParams]] = ReadMEParams
    info = MethodInfo(
        title="Read-ME",
        paper="arXiv 2410.19123",
        adapts="nothing",
        trains="experts (LoRA or whole) and the router before the layers, in turns",
        sends="what the round trains",
        weighs="experts: routed rows; router, attention: data size",
        completion="the federation: turns by rounds; equal widths; packages play domains; usage weights",
    )
    needs = frozenset({"experts", "router"})
    pre_gated = True

    def check_config(self, config: Config) -> None:
        if config.adapters.moe is not None:
            raise UserError(
                "adapters.moe: method read-me trains experts that are made of the model's own channels; drop the section, and "
                "set foundation.convert.kind=read-me"
            )

    def assign(self, client: Client, context: RoundContext) -> Assignment:
        assignment = super().assign(client, context)
        if not self._router_turn(context.round):
            return replace(assignment, trains_common=False)
        # The router is of no layer, and beside a head that is trained nothing else is of none.
        return replace(assignment, trained_N=np.zeros(self.facts.depth, dtype=bool), trains_head=False)

    def _router_turn(self, round_index: int) -> bool:
        every = self.params.router_every
        # Round 0 is an evaluation.
        return every > 0 and round_index > 0 and round_index % every == 0

    def observer(self, client: Client, assignment: Assignment, context: RoundContext) -> RoutingObserver | None:
        # By what the client was told, not by the round: a late one trains what was the turn when it was asked.
        return None if assignment.trained_N is None else RoutingObserver(loss=self._loss, overlaps=True)

    def _loss(self, layer: int, routing: Routing, logits_TE: Tensor, valid_T: Tensor) -> Tensor | None:
        assert routing.overlap_TE is not None
        # The engine minimises the mean over layers, and the loss is their sum.
        return len(self.facts.layers) * router_loss(logits_TE, routing.overlap_TE)

    def weights(self, spec: BlockSpec, update: ClientUpdate, data_share: float) -> np.ndarray:
        found = super().weights(spec, update, data_share)
        # Rows are more where there are more data: usage stands in the place of data size.
        return update.counts_LE * (found > 0) if spec.expert else found
