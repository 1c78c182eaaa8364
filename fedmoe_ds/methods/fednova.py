"""FedNova: normalised averaging (Wang, Liu, Liang, Joshi, Poor; NeurIPS 2020, arXiv 2007.07481).

Stated by the paper: client i takes tau_i local steps of rate eta, which change the model by -eta G_i a_i, G_i = its stochastic
gradients (one per step) and a_i = how often each of them counts. FedAvg weighs that by p_i = |D_i| / sum |D|, so clients with
more steps pull harder, and the objective that is minimised is another one than sum p_i F_i. FedNova averages the normalised
directions:

    d_i = G_i a_i / ||a_i||_1            x <- x - tau_eff sum_i p_i eta d_i            tau_eff = sum_i p_i ||a_i||_1

    plain SGD            ||a_i||_1 = tau_i
    momentum rho         ||a_i||_1 = (tau_i - rho (1 - rho^tau_i) / (1 - rho)) / (1 - rho)
    proximal mu          ||a_i||_1 = (1 - (1 - eta mu)^tau_i) / (eta mu)

The authors' code takes tau_eff = sum_i p_i tau_i where there is a proximal term (`effective: steps`). A momentum of the server
(`server.optimizer: fedavgm`) acts on the step, as in both.

Our completions:
- ||a_i||_1 is what the client's own optimizer makes of gradients that are 1 in every step. That gives the lines above, and also
  their combinations and rates that follow a schedule, with eta inside ||a_i||_1.
- p_i and tau_eff are those of a round's participants that came back.
- A clipped gradient and one with weight decay are what the client's gradient is.
- AdamW is refused: its steps are no sum of gradients, so there is no a_i.

With equal ||a_i||_1 this is FedAvg, to the rounding of float32 (changes are added up here, and values there).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from fedmoe_ds.methods import (
    BlockSpec,
    ClientUpdate,
    Config,
    Method,
    MethodInfo,
    MethodParams,
    UserError,
    Weighing,
)


class FedNovaParams(MethodParams):
    """FedNova's step of the server."""

    effective: Literal["norms", "steps"] = Field("norms", description="tau_eff: the mean of ||a_i||_1, or of tau_i")

    def idle(self, config: Config) -> dict[str, str]:
        local = config.local
        if local.momentum or (local.drift == "fedprox" and local.proximal):
            return {}
        return {"effective": "with local.momentum=0 and no proximal term: ||a_i||_1 is tau_i"}


class FedNova(Method):
    """Normalise what clients changed by the length of their ways, and go as far as they went in the mean."""

    Params: ClassVar[type[MethodParams]] = FedNovaParams
    info = MethodInfo(
        title="FedNova",
        paper="arXiv 2007.07481",
        adapts="active experts k",
        trains="LoRA A and B",
        sends="A, B, norm of a",
        weighs="data size over the norm of a, times its mean",
        completion="norm of a from the client's optimizer under unit gradients, schedules included; no AdamW",
    )
    weighing = Weighing(changes=True, tallies=("share", "way"))

    def check_config(self, config: Config) -> None:
        if config.local.optimizer != "sgd":
            raise UserError(
                f"local.optimizer: {config.local.optimizer}: fednova divides a change by how often each gradient counts in it, "
                "and in AdamW's steps gradients do not add up; use sgd"
            )

    def weights(self, spec: BlockSpec, update: ClientUpdate, data_share: float) -> np.ndarray:
        return super().weights(spec, update, data_share) / self._norm(update)

    def tally(self, spec: BlockSpec, update: ClientUpdate, data_share: float) -> dict[str, np.ndarray]:
        share = super().weights(spec, update, data_share)
        # In units of the learning rate, as the norm is.
        way = self._norm(update) if self.params.effective == "norms" else sum(update.rates)
        return {"share": share, "way": share * way}

    def factor(self, tallies: dict[str, np.ndarray]) -> np.ndarray:
        """tau_eff over the sum of shares: of a round's clients that came back, shares need not sum to one."""
        return tallies["way"] / tallies["share"] ** 2

    def _norm(self, update: ClientUpdate) -> float:
        local = self.facts.local
        return way_length(update.rates, local.momentum, local.proximal if local.drift == "fedprox" else 0.0)


def way_length(rates: tuple[float, ...], momentum: float, proximal: float) -> float:
    """||a||_1 times eta: how far SGD goes where every gradient is 1 (and the proximal term pulls back)."""
    way = velocity = 0.0
    for rate in rates:
        velocity = momentum * velocity + 1.0 - proximal * way
        way += rate * velocity
    return way
