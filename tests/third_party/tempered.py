"""Tempered averaging: a client weighs |D|^exponent, from equal weights (0) to FedAvg's (1). A method outside the package."""

import numpy as np
from pydantic import Field

from fedmoe_ds.methods import BlockSpec, ClientUpdate, Method, MethodInfo, MethodParams


class TemperedParams(MethodParams):
    exponent: float = Field(0.5, ge=0, le=1, description="power of the data size")


class Tempered(Method):
    Params = TemperedParams
    info = MethodInfo(
        title="Tempered",
        paper="example",
        adapts="active experts k",
        trains="LoRA A and B",
        sends="A, B",
        weighs="data size to a power",
        completion="all of it",
    )

    def weights(self, spec: BlockSpec, update: ClientUpdate, data_share: float) -> np.ndarray:
        return super().weights(spec, update, data_share) ** self.params.exponent
