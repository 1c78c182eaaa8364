"""The `server:` section: what the server does with the mean of a round, and what it trains by itself."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from fedmoe_ds.config.section import Section


class ServerTrainingConfig(Section):
    """How the server trains the global adapters on the public split (`data.public`); the rest is as clients do it (`local`)."""

    epochs: float = Field(1.0, ge=0, description="passes over the split after every round's step")
    lr: float = Field(1e-3, gt=0, description="peak learning rate, the same in every round")
    warm_up: float = Field(0.0, ge=0, description="passes over it before the first round")


class ServerConfig(Section):
    """What the server does with the mean of a round (Reddi et al., arXiv 2003.00295); fedavg takes it as it is."""

    optimizer: Literal["fedavg", "fedavgm", "fedadagrad", "fedadam", "fedyogi", "fedams"] = "fedavg"
    lr: float = Field(
        1.0,
        ge=0,
        description="server learning rate on mean - global; about 0.01 for those that are adaptive; 0 with `training` alone",
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="momentum")
    beta2: float = Field(0.99, ge=0, lt=1, description="second moment (fedadam, fedyogi, fedams)")
    tau: float = Field(1e-3, gt=0, description="adaptivity: added to the root of the second moment")
    training: ServerTrainingConfig | None = Field(
        None, description="the server's own training on the public split; null: it only takes the mean"
    )

    @model_validator(mode="after")
    def _check_rate(self) -> ServerConfig:
        if self.lr == 0 and self.training is None:
            raise ValueError("server.lr: 0.0: the global adapters would never change; use more, or add server.training")
        return self
