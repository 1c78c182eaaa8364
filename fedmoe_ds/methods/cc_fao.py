"""CC-FAO: client-centric federated adaptive optimization (Sun et al., arXiv 2501.09946).

READ (abstract): arbitrary client participation, asynchronous server aggregation, heterogeneous local computing, an adaptive
server. NOT FOUND: the algorithm box, its constants, public code. READ (FADAS, Wang et al., arXiv 2407.18365, the nearest
published asynchronous adaptive server): AMSGrad on the mean of the changes in a buffer, and min(eta, 1 / tau_max) in the place
of eta once the largest delay in the buffer exceeds tau_c.

COMPLETION, with x_t the global adapters, A_t the arrivals of a round, eta_l the local rate:

    client i takes K_i plain steps from x_{t - tau_i}: the model of tau_i rounds ago; it arrives when it is ready
    Delta_t = (1 / |A_t|) sum_{i in A_t} (x_{t - tau_i} - x_i) / (eta_l K_i)          a mean gradient, whoever was fast
    m = b1 m + (1 - b1) Delta_t,  v = b2 v + (1 - b2) Delta_t^2,  vhat = max(vhat, v)
    eta_t = eta, or eta / max_i tau_i where that exceeds tau_c
    x_{t+1} = x_t - eta_t m / (sqrt(vhat) + eps)

The division by K_i is our reading of heterogeneous local computing; `normalise: false` divides by the same K for all, so that
clients of many steps dominate. Our factor on eta is a share of the rate, where FADAS takes the smaller of eta and 1 / tau_max:
with an eta of 1e-3 that would never be less than eta. eta_l K_i is the sum of the rates of the client's steps, whatever
the schedule. K_i is uniform in 1..2K, tau_i in 0..max_delay; both are the client's own draws, addressed by round and client.
A_t are the drawn participants (`federation.participation`), and |A_t| those of them that came back, per adapter alike: one
that routed no row to an expert counts there as a gradient of zero. eta, b1, b2 and eps are `lr`, `beta1`, `beta2` and `tau` of
`server`.

Simulated asynchrony: rounds stay in lock-step, and a delay decides what a client starts from, not when it is trained. Limits:
the factor on eta sees the delays of all that are drawn, also of one that was kept out of the sums. A tier is evaluated with
the present adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from fedmoe_ds.methods import (
    Assignment,
    BlockSpec,
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
    Weighing,
    generator,
)


class CCFAOParams(MethodParams):
    """What clients differ by, and what the server makes of it."""

    steps: int = Field(4, ge=1, description="K; clients take 1 to 2K local steps, and no more than local.max_steps")
    pace: Literal["drawn", "equal"] = Field("drawn", description="drawn: K_i uniform in 1..2K; equal: K for everybody")
    max_delay: int = Field(4, ge=0, description="delays are uniform in 0 to so many rounds; as many past adapters are kept")
    delay_threshold: int = Field(1, ge=0, description="tau_c; a larger delay in a round lowers the server's rate")
    scaled_rate: bool = Field(True, description="whether delays lower the server's rate")
    normalise: bool = Field(True, description="divide a client's change by its own K_i; false: by K, whatever it took")
    amsgrad: bool = Field(True, description="whether server.optimizer must be fedams; false takes any")

    def idle(self, config: Config) -> dict[str, str]:
        found = {"normalise": "with method.pace=equal"} if self.pace == "equal" else {}
        if self.max_delay < 2:  # a rate over one round is the rate
            return found | dict.fromkeys(("delay_threshold", "scaled_rate"), "with method.max_delay below 2")
        return found if self.scaled_rate else found | {"delay_threshold": "with method.scaled_rate=false"}


class CCFAO(Method):
    """Unequal steps, delays, and an adaptive server that knows of both."""

    Params: ClassVar[type[MethodParams]] = CCFAOParams
    info = MethodInfo(
        title="CC-FAO",
        paper="arXiv 2501.09946",
        adapts="active experts k",
        trains="LoRA A and B",
        sends="changes since its start",
        weighs="1 / (eta K_i), not normalised",
        completion="all but the abstract: K_i and delays are drawn, changes over eta K_i, AMSGrad, rate over the largest delay",
    )
    weighing = Weighing(changes=True, tallies=("arrivals",))

    def __init__(self, params: CCFAOParams) -> None:
        super().__init__(params)
        self.most_delay = params.max_delay

    def check_config(self, config: Config) -> None:
        local, server = config.local, config.server
        # Silence would let a user believe in a number of steps that nobody takes.
        for key, value, usual in (("steps", local.steps, None), ("epochs", local.epochs, 1.0)):
            if value != usual:
                raise UserError(f"local.{key}: {value}: CC-FAO draws every client's steps around method.steps; drop the key")
        if local.optimizer != "sgd" or local.momentum > 0:
            used = f"momentum: {local.momentum}" if local.optimizer == "sgd" else f"optimizer: {local.optimizer}"
            raise UserError(
                f"local.{used}: CC-FAO divides a client's change by eta K, which gives a gradient after plain steps "
                "only; use local.optimizer=sgd and local.momentum=0"
            )
        if self.params.amsgrad and server.optimizer != "fedams":
            raise UserError(
                f"method.amsgrad: true: CC-FAO's server is AMSGrad, and server.optimizer is {server.optimizer}; use "
                "server.optimizer=fedams, with server.lr about 1e-2 and server.tau=1e-8, or method.amsgrad=false"
            )

    def plan(self, context: PlanContext) -> RoundPlan:
        return RoundPlan([replace(client, steps=self._steps(client, context.round)) for client in context.drawn])

    def assign(self, client: Client, context: RoundContext) -> Assignment:
        # Round 0 is the evaluation of a tier.
        return Assignment(client.cap, delay=self._delay(client, context.round) if context.round else None)

    def weights(self, spec: BlockSpec, update: ClientUpdate, data_share: float) -> np.ndarray:
        way, taken = sum(update.rates), update.steps
        return np.full(_head(spec, update), 1.0 / (way if self.params.normalise else way / taken * self.params.steps))

    def tally(self, spec: BlockSpec, update: ClientUpdate, data_share: float) -> dict[str, np.ndarray]:
        return {"arrivals": np.ones(_head(spec, update))}

    def factor(self, tallies: dict[str, np.ndarray]) -> np.ndarray:
        # Where nobody has arrived the sum is zero, whatever it is divided by.
        share: np.ndarray = 1.0 / np.maximum(tallies["arrivals"], 1.0)
        return share

    def server_rate(self, round_index: int, participants: Sequence[Client]) -> float:
        latest = max((self._delay(client, round_index) for client in participants), default=0)
        return 1.0 / latest if self.params.scaled_rate and latest > max(self.params.delay_threshold, 1) else 1.0

    def _steps(self, client: Client, round_index: int) -> int:
        steps, most = int(self.params.steps), self.facts.local.max_steps
        if self.params.pace == "drawn":
            draw = generator(self.facts.seed, "cc-fao steps", round_index, client.index)
            steps = int(draw.integers(1, 2 * steps, endpoint=True))
        return steps if most is None else min(steps, most)

    def _delay(self, client: Client, round_index: int) -> int:
        draw = generator(self.facts.seed, "cc-fao delay", round_index, client.index)
        # Nobody is later than the first round: before it there was nothing to start from.
        return min(int(draw.integers(0, self.params.max_delay, endpoint=True)), round_index - 1)


def _head(spec: BlockSpec, update: ClientUpdate) -> tuple[int, ...]:
    return update.counts_LE.shape if spec.expert else (len(spec.layers),)
