"""Size: parameter counts and shapes of a hosted or dense model, whether or not its weights are loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from fedmoe_ds.foundation.autoep import HostedLayer
from fedmoe_ds.foundation.dense import feed_forward_sites, vocabulary
from fedmoe_ds.foundation.expansion import Expansion
from fedmoe_ds.foundation.layer_shape import LayerShape, layer_shape
from fedmoe_ds.foundation.pre_gate import pre_gate_of


@dataclass(frozen=True)
class ModelSize:
    """`pool_parameters` are all experts of all layers, whoever holds them; `dense_parameters` is everything else.

    Of a dense model, `layers` counts feed-forward blocks, `ffn` is their width, and there are no experts. `vocabulary` is the
    number of rows of the input embedding, 0 for an image classifier, which has none; `tied` says that the output matrix is the
    same. `depth` counts all layers, those without experts too, and `layer` is what one of them is beside its experts. Of the
    dense parameters, `owned` are those of further layers, which the frozen model has no memory for. `pre_gate_bytes` is what a
    router before the layers holds, with the dense projections that its targets are read from: no parameters of the model.
    """

    dense_parameters: int
    pool_parameters: int
    bytes_per_parameter: int
    layers: int
    experts: int
    top_k: int
    hidden: int
    ffn: int
    vocabulary: int
    depth: int
    layer: LayerShape
    tied: bool = False
    owned: int = 0
    pre_gate_bytes: int = 0

    @property
    def head_and_body(self) -> int:
        """Dense numbers that a token row meets in a product: all but an input embedding that is only looked up."""
        return self.dense_parameters - (0 if self.tied else self.vocabulary * self.hidden)


def model_size(model: Any, layers: list[HostedLayer], expansion: Expansion | None = None) -> ModelSize:
    """Measure a model on any device, meta included, at any ep_size; `layers` is empty for a dense model.

    Args:
        expansion: where it has further layers.
    """
    if not layers:
        return _dense_size(model, expansion)
    held = sum(layer.w13.numel() + layer.w2.numel() for layer in layers)
    total = sum(parameter.numel() for parameter in _parameters(model))
    first, gate = layers[0], pre_gate_of(model)
    return ModelSize(
        dense_parameters=total - held,
        # Every rank holds the same number of experts: hosting refuses any other split.
        pool_parameters=held * first.ep_size,
        bytes_per_parameter=first.w13.element_size(),
        layers=len(layers),
        experts=first.num_experts,
        top_k=first.top_k,
        hidden=first.hidden_size,
        ffn=first.ffn_hidden_size,
        vocabulary=vocabulary(model.config),
        depth=model.config.num_hidden_layers,
        layer=layer_shape(model, layers),
        tied=vocabulary(model.config) > 0 and model.config.tie_word_embeddings,
        pre_gate_bytes=0 if gate is None else sum(buffer.nbytes for buffer in gate.buffers()),
    )


def _dense_size(model: Any, expansion: Expansion | None) -> ModelSize:
    sites = feed_forward_sites(model)
    further = [] if expansion is None else [math.prod(shape) for _, shape in expansion.weights(model)]
    parameters = _parameters(model)
    return ModelSize(
        dense_parameters=sum(parameter.numel() for parameter in parameters),
        pool_parameters=0,
        bytes_per_parameter=parameters[0].element_size(),
        layers=len(sites),
        experts=0,
        top_k=0,
        hidden=sites[0].hidden_size,
        ffn=sites[0].ffn_hidden_size,
        vocabulary=vocabulary(model.config),
        depth=len(sites),
        layer=layer_shape(model, []),
        tied=vocabulary(model.config) > 0 and model.config.tie_word_embeddings,
        owned=sum(further) * (0 if expansion is None else expansion.blocks),
    )


def _parameters(model: Any) -> list[nn.Parameter]:
    """Every parameter once: on the meta device, tied ones are still two."""
    tied = model.all_tied_weights_keys
    return [parameter for name, parameter in model.named_parameters(remove_duplicate=False) if name not in tied]
