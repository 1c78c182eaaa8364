"""Size: parameter counts and shapes of a hosted model, whether or not its weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedmoe_ds.foundation.hosting import HostedLayer


@dataclass(frozen=True)
class ModelSize:
    """`pool_parameters` are all experts of all layers, whoever holds them; `dense_parameters` is everything else."""

    dense_parameters: int
    pool_parameters: int
    bytes_per_parameter: int
    layers: int
    experts: int
    top_k: int
    hidden: int
    ffn: int
    vocabulary: int


def model_size(model: Any, layers: list[HostedLayer]) -> ModelSize:
    """Measure a hosted model on any device, meta included, at any ep_size."""
    held = sum(layer.w13.numel() + layer.w2.numel() for layer in layers)
    total = sum(parameter.numel() for parameter in model.parameters())
    first = layers[0]
    return ModelSize(
        dense_parameters=total - held,
        pool_parameters=held * first.ep_size,
        bytes_per_parameter=first.w13.element_size(),
        layers=len(layers),
        experts=first.num_experts,
        top_k=first.top_k,
        hidden=first.hidden_size,
        ffn=first.ffn_hidden_size,
        vocabulary=model.config.vocab_size,
    )
