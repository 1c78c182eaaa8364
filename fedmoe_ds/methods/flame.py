"""FLAME: federated fine-tuning through adaptive SMoE (Le, Tran, Hua, Chawla; arXiv 2506.16600 v2).

Legend: L layers, E experts of the model.

Stated by the paper (as far as it is publicly readable): every client keeps the full-rank global LoRA and changes only k_i, the
number of active experts; the combined expert output is multiplied by a rescaler s_i, which is absent, static (k / k_i) or
learnt with the LoRA; experts are averaged with weights gamma_i^j = (f_i^j)^t |D_i|, f_i^j = a_i^j / S_i, t = 0 giving FedAvg.

Our completions, each kept in the configuration where it is a choice:
- S_i counts tokens, so that f is in [0, 1] and does not depend on batch shapes (the paper says "local training steps").
- The weighted mean is normalised by the sum of weights; an expert that nobody activated keeps its value.
- Adapters that are not per expert (attention, router) use the plain weight |D_i|. A model without experts has no others, and no
  expert output to rescale: there FLAME is FedIT, and its own parameters are refused.
- The learnable rescaler starts at 1 (`rescaler_init: one`) or at k / k_i (`ratio`), is one scalar per client
  (`rescaler_scope: client`, the literal reading of the single index) or one per client and layer, and stays personal: it is
  stored with the client and never averaged. Evaluation of a tier uses the mean over that tier's clients.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from fedmoe_ds.methods import (
    RESCALER,
    Assignment,
    BlockSpec,
    Client,
    ClientUpdate,
    Config,
    Method,
    MethodInfo,
    MethodParams,
    ModelFacts,
    RoundContext,
    UserError,
)


class FlameParams(MethodParams):
    """FLAME's switches, with the values of its ablations."""

    # A client trains on fewer than 2^32 tokens, so f^20 > 2^-640, which sums still hold whatever the data share.
    temperature: float = Field(2.0, ge=0, le=20, description="t; the paper recommends 2 to 4, 0 is FedAvg")
    rescaler: Literal["none", "static", "learnable"] = "learnable"
    rescaler_init: Literal["one", "ratio"] = "one"
    rescaler_scope: Literal["client", "layer"] = "client"

    def idle(self, config: Config) -> dict[str, str]:
        found = {}
        if not config.adapters.experts:
            found["temperature"] = "with adapters.experts=false: no expert's adapter is averaged"
        if self.rescaler != "learnable":
            found |= dict.fromkeys(("rescaler_init", "rescaler_scope"), f"with method.rescaler={self.rescaler}: none is learnt")
        return found


class Flame(Method):
    """Activation-aware aggregation and the output rescaler."""

    Params: ClassVar[type[MethodParams]] = FlameParams
    info = MethodInfo(
        title="FLAME",
        paper="arXiv 2506.16600",
        adapts="active experts k",
        trains="LoRA A and B at full rank, output rescaler s",
        sends="A, B, activation frequencies f",
        weighs="experts: f^t x data size; others: data size",
        completion="f per token; s personal, one per client; initial s; unused experts keep their value",
    )

    without_experts = "fedit"

    def __init__(self, params: FlameParams) -> None:
        super().__init__(params)
        # Only a learnt rescaler is a block of the bank; the static one is a constant of the assignment.
        self.rescaler = params.rescaler_scope if params.rescaler == "learnable" else None

    def check(self, facts: ModelFacts) -> None:
        if not facts.num_experts:
            self._refuse_parameters()
        found = {"rescaler": "static", "rescaler_init": "ratio"}.items()
        key, value = next(((key, value) for key, value in found if getattr(self.params, key) == value), ("", ""))
        if facts.renormalised and key and self.params.rescaler != "none":
            raise UserError(
                f"method.{key}: {value}: this model renormalises its top-k weights, so fewer experts do not shrink "
                "the output; use rescaler=none, or learnable with rescaler_init=one"
            )

    def _refuse_parameters(self) -> None:
        for key, field in type(self.params).model_fields.items():
            if (value := getattr(self.params, key)) != field.default:
                raise UserError(f"method.{key}: {value}: has no effect on a model without experts; drop the key")

    def initial(self, spec: BlockSpec, client: Client) -> float | None:
        if spec.name == RESCALER and self.params.rescaler_init == "ratio":
            # k / k_i is the client's own, so a personal block starts from it and not from a global initial value.
            return self.facts.top_k / client.cap
        return super().initial(spec, client)

    def assign(self, client: Client, context: RoundContext) -> Assignment:
        assignment = super().assign(client, context)
        if self.params.rescaler != "static":
            return assignment
        # Evaluation asks for a tier's assignment too, so its figures have the same factor.
        return replace(assignment, rescale=self.facts.top_k / client.cap)

    def weights(self, spec: BlockSpec, update: ClientUpdate, data_share: float) -> np.ndarray:
        """gamma = f^t |D_i| (FLAME's activation-aware aggregation; |D_i| as a share, which cancels in the mean)."""
        if not spec.expert:
            return super().weights(spec, update, data_share)
        # Counts are of kept slots: at most one per token and expert, so f is in [0, 1]. A client without tokens has f = 0.
        frequency_LE = update.counts_LE / max(update.tokens, 1)
        # 0^0 is 1 in NumPy: with t = 0 experts that a client never used count as well, which is FedAvg.
        weights_LE: np.ndarray = np.power(frequency_LE, self.params.temperature) * data_share
        return weights_LE
