"""Sharp clients weigh more: means weighted by the gradient that a client begins with. A method outside the package."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedmoe_ds.methods import (
    FIRST_STEP,
    Assignment,
    BlockSpec,
    Client,
    ClientUpdate,
    Method,
    MethodInfo,
    MethodParams,
    PlanContext,
    RoundContext,
    RoundPlan,
)


class ProbingParams(MethodParams):
    passes: int = Field(2, ge=0, description="samples that are looked at, one by one; 0: the gradient of the first step")


class Probing(Method):
    Params = ProbingParams
    info = MethodInfo(
        title="Probing",
        paper="example",
        adapts="active experts k",
        trains="LoRA A and B",
        sends="A, B, squared gradients",
        weighs="squared gradients",
        completion="all of it",
    )

    def plan(self, context: PlanContext) -> RoundPlan:
        return RoundPlan([replace(client, probed=min(self.params.passes, client.sequences)) for client in context.drawn])

    def assign(self, client: Client, context: RoundContext) -> Assignment:
        passes = tuple(np.arange(client.probed)[:, None]) if client.probed else FIRST_STEP
        return replace(super().assign(client, context), probe=passes)

    def reduce_probe(self, squares: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
        # All of an expert's blocks, of every layer; the dense ones stand for all experts.
        return sum((square if square.ndim == 2 else square[:, None] for square in squares.values()), np.zeros((1, 1)))

    def weights(self, spec: BlockSpec, update: ClientUpdate, data_share: float) -> np.ndarray:
        assert update.probed is not None
        sharp_LE = data_share * (1e-3 + update.probed.numbers.sum(0))
        return sharp_LE if spec.expert else sharp_LE.sum(1)
