"""Channel-group checks: what a configuration may not ask of experts that are groups of a dense block's channels."""

from __future__ import annotations

from fedmoe_ds.config import Config
from fedmoe_ds.errors import UserError
from fedmoe_ds.foundation.channel_grouping import check_convertible
from fedmoe_ds.foundation.channel_groups import GroupedLayer
from fedmoe_ds.foundation.foundation import planned_config
from fedmoe_ds.foundation.outline import Outline
from fedmoe_ds.methods import Method


def check_planned_groups(config: Config) -> None:
    """Refuse what can be told from the configuration alone. Raises UserError."""
    convert, planned = config.foundation.convert, planned_config(config.foundation)
    if convert is None or convert.kind != "channel-groups":
        return
    if planned is not None:
        check_convertible(planned, convert)
    _check_trained(config, None if planned is None else planned.model_type != "vit")


def check_groups(config: Config, model: Outline) -> None:
    """The same with the model at hand. Raises UserError."""
    if model.layers and isinstance(model.layers[0], GroupedLayer):
        _check_trained(config, model.layers[0].gated)


def check_choice(config: Config, method: Method, model: Outline) -> None:
    """No method moves a choice that nobody makes; it has seen the model's facts. Raises UserError."""
    if method.candidates and model.layers and isinstance(model.layers[0], GroupedLayer):
        raise UserError(
            f"method.name: {config.method.name}: it moves which experts a router chooses, and groups of channels have gates of "
            "one and no router; use another method"
        )


def _check_trained(config: Config, gated: bool | None) -> None:
    """`gated` is whether blocks have a gate; None: nobody knows yet."""
    adapters, local = config.adapters, config.local
    if adapters.router == "train":
        raise UserError("adapters.router: train: groups of channels have gates of one and no router; drop the key")
    for key, loss in (("balance_loss", local.balance_loss), ("z_loss", local.z_loss)):
        if loss > 0:
            raise UserError(f"local.{key}: {loss}: groups of channels have no router whose choice it could change; use 0")
    if gated is False and (not adapters.experts or adapters.expert_training != "full"):
        key, value = ("expert_training", adapters.expert_training) if adapters.experts else ("experts", "false")
        raise UserError(
            f"adapters.{key}: {value}: groups of channels of a block without a gate (ViT) are trained whole, LoRA is for those "
            "with one; use adapters.expert_training=full"
        )
