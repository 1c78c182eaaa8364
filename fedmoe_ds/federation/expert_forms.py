"""Expert forms: what the forms of adapter experts (`adapters.moe`) do not go with."""

from __future__ import annotations

from fedmoe_ds.config import Config
from fedmoe_ds.data import Task
from fedmoe_ds.errors import UserError


def check_router_input(config: Config, task: Task) -> None:
    """One decision per sample is for samples that are read as a whole. Raises UserError."""
    moe = config.adapters.moe
    if moe is not None and moe.router_input == "sample" and task == "causal_lm":
        # The mean over a text has its last tokens, which the first ones are there to predict.
        raise UserError(
            "adapters.moe.router_input: sample: a language model predicts a sample's tokens, which their mean would tell it; "
            "use token, or an image classifier (foundation.preset=tiny-vit)"
        )
