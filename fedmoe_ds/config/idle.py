"""Idle keys: what a configuration sets, away from its default, and what does nothing beside its other keys.

The start line names them. Keys whose neglect would change what is trained (`adapters.experts`, tiers' `rank` and `experts`, a
method's own parameters) are refused elsewhere; these here are legal, so that one base file can serve runs that differ in a key.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fedmoe_ds.config.devices_section import TARGETS
from fedmoe_ds.config.schema import Config


def idle_keys(config: Config) -> list[str]:
    """One text `key=value (reason)` for every key that is set, in the sections below, and does nothing."""
    return [
        f"{section}.{key}={getattr(getattr(config, section), key)} ({reason})"
        for section, keys, reason in _idle(config)
        for key in keys
        if getattr(getattr(config, section), key) != _default(config, section, key)
    ]


def _default(config: Config, section: str, key: str) -> Any:
    return type(getattr(config, section)).model_fields[key].get_default(call_default_factory=True)


def _idle(config: Config) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """(section, keys, why they do nothing)."""
    adapters, federation, local, server = config.adapters, config.federation, config.local, config.server
    evaluation = config.evaluation
    # Adapter experts and whole experts are trained without LoRA, so rank and alpha would have nothing to scale.
    on_experts = adapters.experts and adapters.moe is None and adapters.expert_training == "lora"
    if not on_experts and not adapters.projections:
        yield "adapters", ("rank", "alpha"), "there is no LoRA"
    if not adapters.projections:
        yield "adapters", ("dropout",), "there is no LoRA on projections, and experts have no dropout"
    if federation.participation == 1.0:
        yield "federation", ("sampling",), "federation.participation is 1: all are drawn"
    if local.steps is not None:
        yield "local", ("epochs", "max_steps"), "local.steps is given"
    if local.optimizer == "adamw":
        yield "local", ("momentum",), "local.optimizer is adamw"
    else:
        yield "local", ("betas", "eps"), f"local.optimizer is {local.optimizer}"
        if local.momentum == 0:
            yield "execution", ("moments_on",), "sgd without momentum keeps no moments"
    if local.rounds_schedule == "constant":
        yield "local", ("final_lr",), "local.rounds_schedule is constant"
    if local.drift in ("none", "scaffold"):
        yield "local", ("proximal",), f"local.drift is {local.drift}"
    if local.drift != "fedvra":
        yield "local", ("dual_step", "aggregation_step"), f"local.drift is {local.drift}"
    elif local.dual_step == 0:
        yield "local", ("aggregation_step",), "local.dual_step is 0: the server has no duals to step along"
    if server.optimizer in ("fedavg", "fedavgm"):
        # FedAvgM has momentum but no second moment.
        first = ("beta1",) if server.optimizer == "fedavg" else ()
        yield "server", (*first, "beta2", "tau"), f"server.optimizer is {server.optimizer}"
    if server.optimizer == "fedadagrad":
        yield "server", ("beta2",), "server.optimizer is fedadagrad, which adds squares up"
    if config.privacy.clip is not None and config.privacy.noise_multiplier == 0:
        yield "privacy", ("delta", "key_file"), "privacy.noise_multiplier is 0: nothing is drawn, and nothing is private"
    if config.foundation.expand is None:
        yield "execution", ("owned_gib",), "foundation.expand is null: no client holds whole layers"
    if config.topology.ep_size == 1:
        yield "execution", ("expert_halves",), "topology.ep_size is 1: no row travels"
    if evaluation.generations == 0:
        yield "evaluation", ("max_new_tokens",), "evaluation.generations is 0"
    if config.checkpoint.best is None:
        yield "checkpoint", ("best_split", "best_tier"), "checkpoint.best is null"
    yield from _idle_devices(config)
    if config.data.validation is not None:
        yield "data", ("global_holdout",), "data.validation is given"


def _idle_devices(config: Config) -> Iterator[tuple[str, tuple[str, ...], str]]:
    devices, deadline = config.devices, ("deadline_s", "over_selection")
    buffered = ("buffer", "concurrency", "staleness", "max_staleness")
    if not devices.simulated:
        keys = ("profiles", "availability", "spread", "dropout", "aggregation", *deadline, *buffered, *TARGETS)
        yield "devices", keys, "neither devices.mix nor devices.trace is given"
        return
    if devices.aggregation != "deadline":
        yield "devices", deadline, f"devices.aggregation is {devices.aggregation}"
    if devices.aggregation != "buffered":
        yield "devices", buffered, f"devices.aggregation is {devices.aggregation}"
    else:
        yield "federation", ("participation",), "devices.buffer says how many clients a round has"
