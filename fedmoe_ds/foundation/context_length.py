"""Context length: the longest sequence that a model is made for, from its transformers configuration.

`max_position_embeddings` says it, and scaled rotary embeddings may say more: with linear, dynamic and YaRN scaling (Peng et
al., arXiv 2309.00071) a configuration gives the length of the original training, and the factor that it was stretched by. A
sliding window is no limit: it bounds how far a position looks back, not how many there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def longest_sequence(config: Any) -> int | None:
    """Return the most positions of one sequence, or None for a model without a limit (or without text)."""
    stated: int | None = getattr(config, "max_position_embeddings", None)
    if stated is None:
        return None
    limits = [stated]
    for scaling in _scalings(config):
        original = scaling.get("original_max_position_embeddings") or stated
        limits.append(int(original * (scaling.get("factor") or 1.0)))
    return max(limits)


def longest_alone(config: Any) -> int | None:
    """Return the most positions of a sequence whose rotations depend on nothing but itself, or None for no limit.

    Dynamic and LongRoPE scaling of transformers look at the longest sequence of a pass, and dynamic scaling remembers it:
    beyond the original length a client's rotations would depend on who else is in the pass, and on who was before.
    """
    limits = [
        # Phi's configurations say the original length beside the parameters.
        int(
            scaling.get("original_max_position_embeddings")
            or getattr(config, "original_max_position_embeddings", None)
            or config.max_position_embeddings
        )
        for scaling in _scalings(config)
        if scaling.get("rope_type", scaling.get("type")) in ("dynamic", "longrope")
    ]
    return min(limits, default=None)


def _scalings(config: Any) -> Iterator[Mapping[str, Any]]:
    """The parameters of rotary embeddings that are stretched; some models have one set for each kind of layer."""
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for scaling in (found, *found.values()):
        # Configurations from before `rope_type` call it `type`.
        if isinstance(scaling, Mapping) and scaling.get("rope_type", scaling.get("type", "default")) != "default":
            yield scaling
