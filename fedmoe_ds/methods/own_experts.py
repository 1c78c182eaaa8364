"""Own experts: what a configuration must have where every model of a client is a frozen trunk with experts of its own."""

from __future__ import annotations

from dataclasses import replace

from fedmoe_ds.config import Config
from fedmoe_ds.errors import UserError
from fedmoe_ds.model.adapter_bank import BlockSpec
from fedmoe_ds.model.moe_layer import ROUTER


def check_own_experts(config: Config, title: str, model: str) -> None:
    """Raise UserError where models would share what they train; `model` is what the method `title` calls one of them."""
    adapters = config.adapters
    if adapters.moe is None:
        raise UserError(
            f"adapters.moe: null: the {model}s of {title} are adapter experts beside a dense foundation; add the "
            "section, for instance adapters.moe={experts: 8, top_k: 1}"
        )
    if adapters.moe.top_k != 1:
        raise UserError(
            f"adapters.moe.top_k: {adapters.moe.top_k}: a {model} of {title} uses its own expert alone; use 1, and "
            f"federation.tiers.N.experts for how many {model}s a client trains"
        )
    routing: dict[str, tuple[object, object]] = {
        "zero": (adapters.moe.zero, 0),
        "router_input": (adapters.moe.router_input, "token"),
    }
    routing["gate"] = adapters.moe.gate, "softmax"
    for key, (value, usual) in routing.items():
        if value != usual:
            raise UserError(
                f"adapters.moe.{key}: {value}: a {model} of {title} uses its own expert alone, and its router decides nothing; "
                "drop the key"
            )
    common: dict[str, tuple[object, object]] = {
        "attention": (adapters.attention, []),
        "feed_forward": (adapters.feed_forward, []),
    }
    common |= {"moe.shared": (adapters.moe.shared, 0), "head": (adapters.head, "frozen")}
    for key, (shared, usual) in common.items():
        if shared != usual:
            raise UserError(
                f"adapters.{key}: {shared}: all {model}s of {title} would train them together and be no models of "
                f"their own; use {usual}"
            )
    for key, loss in (("balance_loss", config.local.balance_loss), ("z_loss", config.local.z_loss)):
        if loss > 0:
            raise UserError(f"local.{key}: {loss}: a {model} of {title} has one expert and no router to train; use 0")


def without_routers(specs: list[BlockSpec]) -> list[BlockSpec]:
    """The blocks with routers that stay as they are."""
    # Of one expert the gate is one, whatever the router says: its gradient is rounding noise, which AdamW would scale up.
    return [replace(spec, trained=False) if spec.name == ROUTER else spec for spec in specs]
