"""What a method is: a handful of pure functions.

Legend: L layers, E experts of the model.

A method never touches a process group and the expert pool never knows its name. Third parties add one through the entry-point
group `fedmoe_ds.methods`, without touching a file of this package.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from fedmoe_ds.clients.client import Client
from fedmoe_ds.clients.wave import Report
from fedmoe_ds.config import Config, MethodConfig
from fedmoe_ds.errors import UserError, nearest

GROUP = "fedmoe_ds.methods"


class MethodParams(BaseModel):
    """Base of a method's own parameters; they stand beside `method.name` in the configuration."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Method:
    """FedAvg on adapters; methods override what they change.

    Attributes:
        Params: the method's parameters, a `MethodParams` subclass.
        rescaler: None, `client` or `layer`: whether clients learn a personal factor on the expert output.
    """

    Params: ClassVar[type[MethodParams]] = MethodParams
    rescaler: Literal["client", "layer"] | None = None

    def __init__(self, params: Any) -> None:
        self.params = params

    def check(self, top_k: int, renormalised: bool) -> None:
        """Raise UserError when the model lacks what the method needs; called before any weight is loaded."""

    def initial_rescaler(self, client: Client, top_k: int) -> float:
        """Starting value of the personal factor s_i (only with `rescaler`)."""
        return 1.0

    def fixed_rescale(self, cap: int, top_k: int) -> float | None:
        """A fixed factor on the expert output of a client with this cap, or None."""
        return None

    def allowed_experts(self, client: Client, num_experts: int) -> np.ndarray | None:
        """[E] bool: the experts this client may route to, or None for all. Masked experts get no row and no gradient."""
        return None

    def expert_weights(self, report: Report, data_share: float) -> np.ndarray:
        """[L, E] float64: the client's aggregation weight for every expert. `data_share` = |D_i| / sum_j |D_j|."""
        return np.full(report.counts_LE.shape, data_share)

    def dense_weight(self, report: Report, data_share: float) -> float:
        """The client's aggregation weight for adapters that are not per expert."""
        return data_share


def with_defaults(config: Config, method: Method) -> Config:
    """The configuration with the method's own defaults filled in: what is saved with a run."""
    return config.model_copy(update={"method": config.method.model_copy(update=method.params.model_dump())})


def load_method(config: MethodConfig) -> Method:
    """Find the method by name and check its parameters. Raises UserError with the nearest name or key."""
    found = {point.name: point for point in entry_points(group=GROUP)}
    if config.name not in found:
        raise UserError(f"method.name: {config.name}: there is no such method{nearest(config.name, found)}")
    method: type[Method] = found[config.name].load()
    given = config.model_dump(exclude={"name"})
    for key in given:
        if key not in method.Params.model_fields:
            raise UserError(f"method.{key}: unknown key for method '{config.name}'{nearest(key, method.Params.model_fields)}")
    try:
        return method(method.Params(**given))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"method.{key}: {first['input']!r}: {first['msg']}; see docs/configuration.md") from None
