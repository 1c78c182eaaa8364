"""The `local:` section: local training of one client in one round."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedmoe_ds.config.section import Section


class LocalConfig(Section):
    """Local training of one client in one round."""

    epochs: float = Field(1.0, gt=0, description="passes over the client's data, rounded up to whole steps")
    steps: int | None = Field(None, ge=1, description="exact number of steps for everyone; overrides epochs")
    max_steps: int | None = Field(None, ge=1, description="upper bound on the step count that epochs gives")
    batch_size: int = Field(4, ge=1, description="sequences per step")
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="over the client's own steps")
    rounds_schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="of the rate that a round starts from: across federation.rounds, from lr to final_lr"
    )
    final_lr: float = Field(1e-6, gt=0, description="rate of the last round, with rounds_schedule linear or cosine")
    warmup: float = Field(0.0, ge=0, lt=1, description="share of the client's own steps")
    weight_decay: float = Field(0.0, ge=0, description="of all that a client trains, experts that it never used included")
    momentum: float = Field(0.0, ge=0, lt=1, description="SGD only")
    moments: Literal["float32", "bfloat16"] = Field(
        "float32", description="what optimizer state is kept in; bfloat16 is rounded at random, steps compute in float32"
    )
    # A list and not a tuple: strict pydantic takes no YAML sequence for a tuple.
    betas: list[float] = Field([0.9, 0.999], min_length=2, max_length=2)
    eps: float = Field(1e-8, gt=0)
    clip: float | None = Field(1.0, gt=0, description="per-client gradient norm bound over all of its adapters")
    drift: Literal["none", "fedprox", "scaffold", "fedvra", "feddyn"] = Field(
        "none",
        description="correction of client drift; scaffold: variates are mean steps, clipped ones where clip acts; feddyn: "
        "fedvra with both steps 1",
    )
    proximal: float = Field(0.01, ge=0, description="pull to the global value: FedProx mu, FedVRA gamma, FedDyn alpha")
    dual_step: float = Field(1.0, ge=0, description="FedVRA a: step of a client's dual variables, times proximal")
    aggregation_step: float = Field(1.0, ge=0, description="FedVRA d: how far the server goes along its duals / proximal")
    balance_loss: float = Field(0.0, ge=0, description="coefficient of the load-balance loss of a step")
    z_loss: float = Field(0.0, ge=0, description="coefficient of the router z-loss")


def problem_of_drift(local: LocalConfig) -> str | None:
    """What keeps `local.drift` from meaning what its paper says; None: nothing."""
    # Karimireddy et al., arXiv 1910.06378, option II: c_i+ = c_i - c + (x - y_i) / (K lr) holds for plain steps only.
    if local.drift == "scaffold" and (local.optimizer != "sgd" or local.momentum > 0):
        return (
            "local.drift: scaffold: its control variates are mean gradients, so clients must take plain gradient steps; "
            "use local.optimizer=sgd and local.momentum=0"
        )
    # The server divides its duals by gamma; without a step along them (d = 0) it does not, and gamma = 0 is FedAvg.
    if local.proximal == 0 and (local.drift == "feddyn" or (local.drift == "fedvra" and local.aggregation_step > 0)):
        way = "" if local.drift == "feddyn" else ", or local.aggregation_step=0"
        return f"local.proximal: 0.0: {local.drift}'s server divides its dual variables by it; use more than 0{way}"
    return None
