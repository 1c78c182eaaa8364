"""Dense foundations: which families are known, where their feed-forward blocks are, and what an image classifier takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from fedmoe_ds.data import ImageInput, Task

DECODERS = ("llama", "mistral", "olmo", "olmo2", "qwen2", "qwen3")
VIT = "vit"
DENSE = (*DECODERS, VIT)
"""Model types whose feed-forward block is one module without the residual, at `<decoder>.layers.N.mlp`."""


@dataclass(frozen=True)
class FeedForwardSite:
    """One feed-forward block of a dense model: a module y = FFN(x) on [B, S, D], to be wrapped by adapters.

    The layer normalises before (x = LN(h)) and adds the residual after it: h + FFN(LN(h)), so a replacement that returns
    FFN(x) plus the adapters' output is in the residual branch. OLMo2 alone normalises after: h + LN(FFN(h)).
    """

    path: str
    index: int
    hidden_size: int
    ffn_hidden_size: int

    def module(self, model: nn.Module) -> nn.Module:
        """What stands at the site now."""
        return model.get_submodule(self.path)

    def replace(self, model: nn.Module, module: nn.Module) -> None:
        """Put another module at the site."""
        owner, _, leaf = self.path.rpartition(".")
        setattr(model.get_submodule(owner), leaf, module)


def is_dense(model: Any) -> bool:
    """Whether a model is of a dense family that is known."""
    return model.config.model_type in DENSE


def feed_forward_sites(model: Any) -> list[FeedForwardSite]:
    """The feed-forward blocks of a dense model in depth order, also while other modules stand there."""
    assert is_dense(model), model.config.model_type
    config = model.config
    # By rule, not by search: other modules may already stand in the places of the blocks.
    prefix = model.base_model_prefix
    return [
        FeedForwardSite(f"{prefix}.layers.{index}.mlp", index, config.hidden_size, config.intermediate_size)
        for index in range(config.num_hidden_layers)
    ]


def type_task(model_type: str) -> Task:
    """What a model of this type predicts; every type but ViT is loaded as a causal language model."""
    return "image_classification" if model_type == VIT else "causal_lm"


def vocabulary(config: Any) -> int:
    """Rows of the input embedding; 0 for an image classifier."""
    return int(config.vocab_size) if type_task(config.model_type) == "causal_lm" else 0


def image_input(config: Any) -> ImageInput:
    """What a ViT takes, from its transformers configuration."""
    height, width = _pair(config.image_size)
    patch_height, patch_width = _pair(config.patch_size)
    positions = (height // patch_height) * (width // patch_width) + 1  # the class token is one more
    return ImageInput(config.num_channels, height, width, config.num_labels, positions)


def _pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width
