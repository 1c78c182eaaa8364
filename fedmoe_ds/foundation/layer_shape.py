"""Layer shape: how wide the parts of a model's layers are, outside of its routed experts, by its configuration.

Widths differ between families more than their names do: heads need not divide the model width (Qwen3), keys and values may have
fewer heads than queries (Mixtral), and multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) has keys wider than values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class AttentionShape:
    """Attention of one layer.

    Attributes:
        heads, kv_heads: of queries, and of keys and values.
        key_width, value_width: of one head.
        value_stride: numbers of one head among which its values lie; more than `value_width` where keys lie beside them.
        normed: numbers of a token row that norms inside of attention take in.
        causal: whether a position sees only those before it.
    """

    heads: int
    kv_heads: int
    key_width: int
    value_width: int
    value_stride: int
    normed: int
    causal: bool = True

    @property
    def score_products(self) -> float:
        """Multiplications of one (query, key) pair of one head, over all pairs: those behind a causal mask are skipped."""
        return (self.key_width + self.value_width) * (0.5 if self.causal else 1.0)


@dataclass(frozen=True)
class LayerShape:
    """A layer without its routed experts.

    Attributes:
        norms: norms of model width.
        feed_forward: width of the block of layers without experts; 0 where all have them.
        shared: width of the shared experts; 0 without.
        shared_gate: whether a gate weighs them.
        gated: whether feed-forward blocks multiply two branches.
    """

    attention: AttentionShape
    norms: int
    feed_forward: int
    shared: int
    shared_gate: bool
    gated: bool


def attention_shape(model: Any) -> AttentionShape:
    """The attention of a transformers model."""
    config, heads = model.config, model.config.num_attention_heads
    causal = hasattr(config, "vocab_size")
    if getattr(config, "kv_lora_rank", None):
        key = config.qk_nope_head_dim + config.qk_rope_head_dim
        # Keys and values come out of one product, head by head, and values are read where they lie.
        stride, latent = config.qk_nope_head_dim + config.v_head_dim, (config.q_lora_rank or 0) + config.kv_lora_rank
        return AttentionShape(heads, heads, key, config.v_head_dim, stride, latent, causal)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    normed = (heads + kv_heads) * width if any(name.endswith(".q_norm") for name, _ in model.named_modules()) else 0
    return AttentionShape(heads, kv_heads, width, width, width, normed, causal)


def layer_shape(model: Any, experts: list[Any]) -> LayerShape:
    """The layers of a model; `experts` are its hosted mixture layers."""
    config, layers = model.config, model.base_model.layers
    shared = experts[0].module.shared_experts if experts else None
    blocks = [layer.mlp for index, layer in enumerate(layers) if index not in {hosted.index for hosted in experts}]
    return LayerShape(
        attention=attention_shape(model),
        # Norms hang on a layer itself; those inside of its attention are counted there.
        norms=sum(type(part).__name__.endswith("Norm") for part in layers[0].children()),
        feed_forward=_inner_width(blocks[0], config) if blocks else 0,
        shared=_inner_width(shared, config) if shared is not None else 0,
        shared_gate=experts != [] and experts[0].module.shared_experts_gate is not None,
        gated=not blocks or any(name.endswith(("gate_proj", "gate_up_proj")) for name, _ in blocks[0].named_modules()),
    )


def _inner_width(block: nn.Module, config: Any) -> int:
    """The width between the two products of a feed-forward block."""
    # Families join gate and up, or do not; what leads back is the same in all of them, but for ViT.
    found = [module for path, module in block.named_modules() if path.endswith(("down_proj", "fc2"))]
    # A bias alone has no products.
    return int(found[0].in_features) if found else int(config.intermediate_size) if list(block.children()) else 0
