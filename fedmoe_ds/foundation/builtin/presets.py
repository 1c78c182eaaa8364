"""Presets: built-in foundations, small enough for a laptop.

OLMoE (https://arxiv.org/abs/2409.02060), and dense models without experts: Llama (https://arxiv.org/abs/2302.13971), and ViT
(https://arxiv.org/abs/2010.11929) for the 8x8 digits and MNIST.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import LlamaConfig, OlmoeConfig, ViTConfig

from fedmoe_ds.data import Task, digits
from fedmoe_ds.data.digits import Images
from fedmoe_ds.data.forms.colours import CHANNELS, in_any_colours
from fedmoe_ds.data.mnist import IMAGE_SETS
from fedmoe_ds.errors import UserError, nearest

PAD_TOKEN_ID = 0
EOS_TOKEN_ID = 1

Family = Literal["olmoe", "llama", "vit"]
_CONFIGS: dict[Family, type[Any]] = {"olmoe": OlmoeConfig, "llama": LlamaConfig, "vit": ViTConfig}

_TEXT: dict[str, Any] = {
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "pad_token_id": PAD_TOKEN_ID,
    "eos_token_id": EOS_TOKEN_ID,
    "bos_token_id": None,
}
# As in the published model: the chosen weights are not scaled to sum to one.
_OLMOE: dict[str, Any] = {**_TEXT, "norm_topk_prob": False}
_DIGITS: dict[str, Any] = {
    "num_channels": digits.SHAPE[0],
    "image_size": digits.SHAPE[1],
    "patch_size": 2,
    "num_labels": digits.CLASSES,
    # ViT's own 0.02 is for widths near 1000; at 32 to 64, a few hundred steps would hardly leave the initial plateau.
    "initializer_range": 0.1,
}


@dataclass(frozen=True)
class Preset:
    """A model family of transformers, and the arguments of its configuration."""

    family: Family
    arguments: dict[str, Any]

    @property
    def task(self) -> Task:
        return "image_classification" if self.family == "vit" else "causal_lm"

    def images(self, cache: Path, seed: int) -> Images:
        """What a vision transformer is pre-trained on: images of its size that no client has, painted if it sees colours."""
        given = next(given for given in IMAGE_SETS.values() if given.shape[1] == self.arguments["image_size"])
        own, _ = given.split(cache)
        return in_any_colours(own, seed) if self.arguments["num_channels"] == CHANNELS else own

    def config(self) -> Any:
        """A new transformers configuration."""
        return _CONFIGS[self.family](**self.arguments)

    def record(self) -> dict[str, Any]:
        """What enters the cache key of the pre-trained model. OLMoE came first, so its record is the arguments alone."""
        return self.arguments if self.family == "olmoe" else {"model_type": self.family, **self.arguments}


PRESETS: dict[str, Preset] = {
    "tiny-olmoe": Preset(
        "olmoe",
        {
            "vocab_size": 2048,
            "hidden_size": 128,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "num_experts": 16,
            "num_experts_per_tok": 8,
            **_OLMOE,
        },
    ),
    "nano-olmoe": Preset(
        "olmoe",
        {
            "vocab_size": 512,
            "hidden_size": 32,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "num_experts": 8,
            "num_experts_per_tok": 4,
            **_OLMOE,
        },
    ),
    "tiny-llama": Preset(
        "llama",
        {
            "vocab_size": 2048,
            "hidden_size": 80,
            "intermediate_size": 160,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            **_TEXT,
        },
    ),
    "nano-llama": Preset(
        "llama",
        {
            "vocab_size": 512,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            **_TEXT,
        },
    ),
    "tiny-vit": Preset(
        "vit",
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, **_DIGITS},
    ),
    "tiny-vit-28": Preset(
        "vit",
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            **_DIGITS,
            "image_size": 28,
            "patch_size": 4,
        },
    ),
    "nano-vit": Preset(
        "vit",
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, **_DIGITS},
    ),
    "nano-vit-rgb": Preset(
        "vit",
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            **_DIGITS,
            "num_channels": CHANNELS,
        },
    ),
}


def find_preset(name: str, others: Iterable[str] = ()) -> Preset:
    """Return a built-in preset by name; `others` are the names of presets that are not built in.

    Raises:
        UserError: no preset has this name.
    """
    if name not in PRESETS:
        raise UserError(f"foundation.preset: {name}: unknown preset{nearest(name, [*PRESETS, *others])}")
    return PRESETS[name]
