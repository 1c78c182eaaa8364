"""Pre-gate check: what of a configuration cannot go together with a router that runs before the layers."""

from __future__ import annotations

from typing import Any

from fedmoe_ds.config import Config
from fedmoe_ds.errors import UserError
from fedmoe_ds.foundation.pre_gate import PreGateShape
from fedmoe_ds.methods import Method


def check_pre_gate(config: Config, method: Method, model: Any) -> None:
    """Raise UserError where method, configuration and model, by its transformers configuration, do not go together."""
    name, local = config.method.name, config.local
    if PreGateShape.of(model) is None:
        if method.pre_gated:
            raise UserError(
                f"method.name: {name}: it teaches a router that runs before the layers, and this foundation's are in its "
                "layers; set foundation.convert.kind=read-me, or use another method"
            )
        return
    why = "the foundation's router runs before its layers, and "
    if config.adapters.router == "train" and not method.pre_gated:
        raise UserError(
            f"adapters.router: train: {why}its experts have weight one, so method {name} gives it no gradient; use frozen, or "
            "method.name=read-me"
        )
    for key, value in (("balance_loss", local.balance_loss), ("z_loss", local.z_loss)):
        if value and not method.pre_gated:
            raise UserError(f"local.{key}: {value}: {why}method {name} trains no router; use 0")
    if method.candidates:
        raise UserError(
            f"method.name: {name}: {why}decides once for all of them, where this method moves the choice layer by layer; use "
            "another method"
        )
    if config.execution.packing:
        raise UserError(f"execution.packing: true: {why}reads whole samples, where a packed pass has single tokens; use false")
