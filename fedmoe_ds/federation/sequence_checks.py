"""Sequence checks: lengths, rotary positions and packing against what a model takes."""

from __future__ import annotations

from typing import Any

from fedmoe_ds.config import Config
from fedmoe_ds.errors import UserError
from fedmoe_ds.foundation.context_length import longest_alone, longest_sequence
from fedmoe_ds.foundation.dense import type_task
from fedmoe_ds.foundation.families import packs


def check_length(config: Config, model: Any) -> None:
    """The model has a position for every token of a sequence. `model` is its transformers configuration, None if unknown yet.

    Raises UserError.
    """
    longest = longest_sequence(model)
    if longest is not None and config.data.sequence_length > longest:
        raise UserError(
            f"data.sequence_length: {config.data.sequence_length}: the foundation "
            f"({config.foundation.path or config.foundation.preset}) has {longest} positions; use at most {longest}"
        )


def check_rotations(config: Config, model: Any, bitwise: bool) -> None:
    """In bitwise mode no client's rotary embeddings depend on another's length. Raises UserError."""
    longest = longest_alone(model) if bitwise else None
    if longest is not None and config.data.sequence_length > longest:
        raise UserError(
            f"data.sequence_length: {config.data.sequence_length}: beyond {longest} positions the foundation's rotary "
            f"embeddings depend on the longest sequence of a pass, so bits would depend on neighbours; use at most {longest}, "
            "or execution.reproducible=fast"
        )


def check_packing(config: Config, model: Any) -> None:
    """Samples can be packed, and are not already. `model` is its transformers configuration, None if unknown yet.

    Raises UserError.
    """
    if not config.execution.packing:
        return
    if model is not None and not packs(model.model_type):
        text = type_task(model.model_type) == "causal_lm"
        why = "in some of its layers tokens meet outside plain attention" if text else "images need no padding"
        raise UserError(f"execution.packing: true: the foundation is a '{model.model_type}' model: {why}; use false")
    check_packed_samples(config, config.data.template)


def check_packed_samples(config: Config, template: str | None) -> None:
    """Samples of this template can be packed. Raises UserError; with data.template=auto only the data tell the template."""
    if config.execution.packing and template == "text":
        raise UserError(
            "execution.packing: true: documents (data.template=text) are cut into full sequences already, so nothing would be "
            "saved; use false"
        )
