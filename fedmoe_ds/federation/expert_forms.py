"""Expert forms: what the forms of adapter experts (`adapters.moe`) do not go with."""

from __future__ import annotations

from collections.abc import Iterable

from fedmoe_ds.config import Config
from fedmoe_ds.data import Task
from fedmoe_ds.errors import UserError
from fedmoe_ds.model.adapter_bank import ROUTER_BIAS, BlockSpec


def check_router_input(config: Config, task: Task) -> None:
    """One decision per sample is for samples that are read as a whole. Raises UserError."""
    moe = config.adapters.moe
    if moe is not None and moe.router_input == "sample" and task == "causal_lm":
        # The mean over a text has its last tokens, which the first ones are there to predict.
        raise UserError(
            "adapters.moe.router_input: sample: a language model predicts a sample's tokens, which their mean would tell it; "
            "use token, or an image classifier (foundation.preset=tiny-vit)"
        )


def check_router_bias(config: Config, blocks: Iterable[BlockSpec]) -> None:
    """A router's bias is known per expert, and has nothing to say of those that add nothing. Raises UserError."""
    moe = config.adapters.moe
    if moe is not None and moe.zero and any(block.name == ROUTER_BIAS for block in blocks):
        raise UserError(
            f"adapters.moe.zero: {moe.zero}: method {config.method.name} moves routers by how much experts are used, and these "
            "are not there to be used; use 0"
        )
