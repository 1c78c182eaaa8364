"""Tempered averaging: a client weighs |D|^exponent, from equal weights (0) to FedAvg's (1). A method outside the package."""

import numpy as np
from pydantic import Field

from fedmoe_ds.adapters.bank import BlockSpec
from fedmoe_ds.clients.report import Report
from fedmoe_ds.methods import Method, MethodParams
from fedmoe_ds.methods.base import Card


class TemperedParams(MethodParams):
    exponent: float = Field(0.5, ge=0, le=1, description="power of the data size")


class Tempered(Method):
    Params = TemperedParams
    card = Card(
        title="Tempered",
        paper="example",
        adapts="active experts k",
        trains="LoRA A and B",
        sends="A, B",
        weighs="data size to a power",
        completion="all of it",
    )

    def weights(self, spec: BlockSpec, report: Report, data_share: float) -> np.ndarray:
        return super().weights(spec, report, data_share) ** self.params.exponent
