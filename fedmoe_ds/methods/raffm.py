"""RaFFM: clients train the most salient channels of a dense model's feed-forward blocks (Yu et al., arXiv 2310.00247).

Legend: L layers, E groups of channels, S participants of a round.

    s_j = ||W_in, row j||_1 + ||W_out, column j||_1,  channels in the order of s, cut into E equal groups
    client i trains and runs the first e_i groups of every block:   FFN_i(x) = b + sum_{e < e_i} E_e(x)
    W_e <- sum_{i in S: e < e_i} p_i W_e^i / sum_{i in S: e < e_i} p_i,   p_i = |D_i| / sum |D|

READ (the paper, an OpenReview thread): salient parameters come first; sub-models are leading slices, as wide as a client's
resources allow; ViT, BERT, RoBERTa, FLAN-T5. Neither how clients' data differ nor the mix of sub-models in its tables is told,
so no number of it can be reproduced. CODE (yusx-swapp/RaFFM @ 7c7186b4): feed-forward widths 3072, 1920 or 1280 drawn for every
layer; in each round the first client that was sampled gets the full model, the second the smallest, the others a random one;
the server adds every local value / |S| into the leading slice of zeros, so channels that few hold shrink. It reorders
the rows of Q and K within each head, while its default sub-models cut feed-forward channels alone: the two do not meet.

COMPLETION:
- Saliency is of feed-forward channels, of all matrices that a channel has a row or column of: a permutation of channels keeps
  the function of every block, with a gate or without. It is taken once, of the foundation (`foundation.convert`): a server that
  sorted again in every round would have to move what clients know of the old order.
- Attention is not permuted and its width not reduced. On models with rotary positions a permutation of rows of Q and K would be
  another function (the paper's theorem holds without them, as for ViT); norms, head and biases stay the foundation's.
- Widths follow the tier, `federation.tiers.N.top_k` of the E groups. `widths: random` is the code's rule: who is first and who
  is second is drawn, the others draw a width for every layer among those of the tiers; tiers are then what is evaluated, and
  not what their clients train.
- `missing: holders` is the mean over those who hold a channel, by data size. `missing: zero` is the code's sum with the same
  weights: a client that lacks a channel counts as zero there. A group that nobody in a round holds stays.

Limits: E groups are cut where the code cuts at three widths; every rank holds all groups of its shard, so a sub-model saves
compute and what a client would send, not memory here. With LoRA (`adapters.expert_training: lora`, on blocks with a gate) the
means are those of factors, as in the code's variant for PEFT.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from fedmoe_ds.methods import (
    Assignment,
    BlockSpec,
    Client,
    ClientUpdate,
    Config,
    MeanContext,
    Method,
    MethodInfo,
    MethodParams,
    PlanContext,
    RoundContext,
    RoundPlan,
    TensorRule,
    UserError,
    generator,
    tiers_of,
)


class RaFFMParams(MethodParams):
    """How wide sub-models are, and what a channel counts as where a client lacks it."""

    widths: Literal["tier", "random"] = Field(
        "tier", description="tier: as many groups as its top_k; random: one full, one smallest, others drawn layer by layer"
    )
    missing: Literal["holders", "zero"] = Field(
        "holders", description="mean of a group over those who hold it; zero: over all, as if the others sent zeros"
    )


class RaFFM(Method):
    """Nested sub-models of salient channels."""

    Params: ClassVar[type[MethodParams]] = RaFFMParams
    info = MethodInfo(
        title="RaFFM",
        paper="arXiv 2310.00247",
        adapts="feed-forward channels held, the most salient first",
        trains="its groups of channels (dense foundation, converted)",
        sends="its groups",
        weighs="data size among those who hold the group",
        completion="saliency of feed-forward channels, once; widths by tier; mean over holders",
    )
    needs = frozenset({"experts"})

    def check_config(self, config: Config) -> None:
        convert = config.foundation.convert
        kind = None if convert is None else convert.kind
        if kind != "channel-groups":
            raise UserError(
                f"foundation.convert: {kind or 'null'}: RaFFM trains groups of a dense foundation's feed-forward channels; add "
                "the section, for instance foundation.convert={experts: 8}"
            )

    # Which groups

    def plan(self, context: PlanContext) -> RoundPlan:
        if self.params.widths == "tier":
            return RoundPlan(context.drawn)
        widths = sorted({clients[0].cap for clients in tiers_of(context.clients).values()})
        return RoundPlan(context.drawn, self._drawn_widths(context, widths))

    def _drawn_widths(self, context: PlanContext, widths: list[int]) -> dict[int, np.ndarray]:
        """The groups of every layer that each client holds, int64 [L]."""
        layers, seed = len(self.facts.layers), self.facts.seed
        parts = {}
        for place, turn in enumerate(generator(seed, "sub-models", context.round).permutation(len(context.drawn))):
            client = context.drawn[int(turn)]
            if place == 0:
                parts[client.index] = np.full(layers, self.facts.num_experts)
            elif place == 1:
                parts[client.index] = np.full(layers, widths[0])
            else:
                draw = generator(seed, "sub-model widths", context.round, client.index)
                parts[client.index] = draw.choice(widths, layers)
        return parts

    def assign(self, client: Client, context: RoundContext) -> Assignment:
        layers, count = self.facts.experts_shape
        # An evaluation follows no plan: it is of the tier's width.
        width_L = np.full(layers, client.cap) if context.plan is None else context.plan
        held_LE = np.arange(count) < width_L[:, None]
        # A client of the full model is told nothing: it then is FedAvg's, to the bit.
        allowed_LE = None if held_LE.all() else held_LE
        return Assignment(min(int(width_L.max()), self.facts.top_k), allowed_LE=allowed_LE)

    # What it weighs

    def held(self, update: ClientUpdate) -> np.ndarray:
        """The groups that a client had, bool [L, E]."""
        held_LE = update.assignment.allowed_LE
        return np.ones(self.facts.experts_shape, dtype=bool) if held_LE is None else held_LE

    def weights(self, spec: BlockSpec, update: ClientUpdate, data_share: float) -> np.ndarray:
        weight = super().weights(spec, update, data_share)
        return weight * self.held(update) if spec.expert else weight

    def memory(self) -> dict[str, tuple[int, ...]]:
        return {"held": self.facts.experts_shape, "samples": ()} if self.params.missing == "zero" else {}

    def memorise(self, update: ClientUpdate) -> dict[str, np.ndarray]:
        if self.params.missing != "zero":
            return {}
        return {"held": self.held(update).astype(np.float64), "samples": np.array(float(update.client.samples))}

    def after_mean(self, context: MeanContext) -> TensorRule | None:
        if self.params.missing != "zero" or not context.memories:
            return None
        known = [memory for _, memory in sorted(context.memories.items())]
        # Whole numbers, whose sums are exact in any order.
        every = math.fsum(float(one["samples"]) for one in known)
        share_LE: np.ndarray = np.sum([one["held"] * float(one["samples"]) for one in known], axis=0) / every
        places = {layer: place for place, layer in enumerate(self.facts.layers)}

        def shrink(key: str, mean: Tensor) -> Tensor:
            _, layer, head, *rest = key.split(".")
            if head != "experts":
                return mean
            shrunk: Tensor = mean.double() * float(share_LE[places[int(layer)], int(rest[0])])
            return shrunk.float()

        return shrink
