"""q-FedAvg: fair federated averaging (Li, Sanjabi, Beirami, Smith; ICLR 2020, arXiv 1905.10497).

Stated by the paper: q-FFL minimises sum_k p_k / (q + 1) F_k^(q + 1); a larger q gives clients of a high loss F_k more say;
q = 0 is the usual objective, and q towards infinity its worst client alone. q-FedAvg (algorithm 2), with w_k client k's model
after its local steps and L the inverse of the rate that serves q = 0:

    Delta_k = L (w - w_k)                                            h_k = q F_k^(q-1) ||Delta_k||^2 + L F_k^q
    w <- w - sum_k F_k^q Delta_k / sum_k h_k

over the participants of a round; ||.|| is that of all adapters of a client together. h_k bounds the curvature of
F_k^(q+1) / (q + 1), so a rate that was found for q = 0 serves every q. Clients are drawn by p_k there
(`federation.sampling: size`), and count alike.

Our completions:
- F_k is the mean training loss over the round's local steps (`loss: round`): every sample that is trained on counts once per
  epoch, on models that move. The paper's is that of the received model over all of the client's data, which would take a pass
  of its own; its estimate without one is the first batch's loss (`loss: first`), noisier.
- 1e-10 is added to F_k, as the authors' code does: a loss of zero has no power below zero.
- L is 1 / local.lr (`lipschitz: null`) with SGD; AdamW's steps do not grow with gradients, so L must be named there.

With q = 0 this is the mean with equal weights, to the rounding of float32 (changes are added up here, and values there).
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

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
    shared_blocks,
)

CHANGE = ".change"
SMALLEST_LOSS = 1e-10


class QFedAvgParams(MethodParams):
    """q-FFL's exponent, and what its step is made of."""

    # A loss of 2^30 to the 20th power is 2^600, which sums still hold.
    q: float = Field(1.0, ge=0, le=20, description="0: equal weights; larger: more say for clients of a high loss")
    lipschitz: float | None = Field(None, gt=0, description="L; null: 1 / local.lr")
    loss: Literal["round", "first"] = Field("round", description="F_k: the mean over the round's steps, or the first step's")

    def idle(self, config: Config) -> dict[str, str]:
        return {} if self.q else dict.fromkeys(("lipschitz", "loss"), "with method.q=0: all clients count alike")


class QFedAvg(Method):
    """Clients of a high loss pull harder, and the step shrinks by as much as that makes the objective steeper."""

    Params: ClassVar[type[MethodParams]] = QFedAvgParams
    info = MethodInfo(
        title="q-FedAvg",
        paper="arXiv 1905.10497",
        adapts="active experts k",
        trains="LoRA A and B",
        sends="A, B, loss F",
        weighs="F^q over the sum of h",
        completion="F is the mean training loss of the round (or its first step's)",
    )
    weighing = Weighing(changes=True, tallies=("h",))
    weighs_losses = True

    def check_config(self, config: Config) -> None:
        if self.params.q and self.params.lipschitz is None and config.local.optimizer != "sgd":
            raise UserError(
                f"local.optimizer: {config.local.optimizer}: q-fedavg takes 1 / local.lr for the Lipschitz constant L, and "
                "AdamW's rate says nothing about it; use sgd, or name method.lipschitz"
            )

    @torch.no_grad()
    def measure(self, view: ClientView) -> dict[str, Tensor]:
        """||w - w_k||^2 of every (layer, expert) and layer."""
        found = {}
        for spec in shared_blocks(view.blocks()):
            change = (view.value(spec) - view.received(spec)).flatten(-len(spec.item)).contiguous()
            found[spec.name + CHANGE] = torch.linalg.vector_norm(change, dim=-1, dtype=torch.float64).square()
        return found

    def weights(self, spec: BlockSpec, update: ClientUpdate, data_share: float) -> np.ndarray:
        return super().weights(spec, update, self._lipschitz * self._loss(update) ** self.params.q)

    def tally(self, spec: BlockSpec, update: ClientUpdate, data_share: float) -> dict[str, np.ndarray]:
        q, steep, loss = self.params.q, self._lipschitz, self._loss(update)
        # Measures are gathered: every rank adds up the same numbers in one order.
        squares = [v.sum() for name, v in sorted(update.measured.items()) if name.endswith(CHANGE)]
        curvature = q * loss ** (q - 1) * steep**2 * math.fsum(squares)
        return {"h": super().weights(spec, update, curvature + steep * loss**q)}

    def factor(self, tallies: dict[str, np.ndarray]) -> np.ndarray:
        return 1.0 / tallies["h"]

    @property
    def _lipschitz(self) -> float:
        return 1.0 / self.facts.local.lr if self.params.lipschitz is None else self.params.lipschitz

    def _loss(self, update: ClientUpdate) -> float:
        assert update.shared_losses is not None
        first, mean = update.shared_losses
        return (first if self.params.loss == "first" else mean) + SMALLEST_LOSS
