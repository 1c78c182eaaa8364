"""Built-in tiny foundations: OLMoE-architecture shapes (https://arxiv.org/abs/2409.02060) small enough for a laptop."""

from __future__ import annotations

from typing import Any

from transformers import OlmoeConfig

from fedmoe_ds.errors import UserError, nearest

PAD_TOKEN_ID = 0
EOS_TOKEN_ID = 1

_COMMON: dict[str, Any] = {
    "max_position_embeddings": 512,
    "norm_topk_prob": False,
    "tie_word_embeddings": False,
    "pad_token_id": PAD_TOKEN_ID,
    "eos_token_id": EOS_TOKEN_ID,
    "bos_token_id": None,
}

# The arguments themselves are the record: they enter the cache key of a pre-trained preset.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny-olmoe": {
        "vocab_size": 2048,
        "hidden_size": 128,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_experts": 16,
        "num_experts_per_tok": 8,
        **_COMMON,
    },
    "nano-olmoe": {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_experts": 8,
        "num_experts_per_tok": 4,
        **_COMMON,
    },
}


def preset_arguments(name: str) -> dict[str, Any]:
    """Return the `OlmoeConfig` arguments of a preset.

    Raises:
        UserError: no preset has this name.
    """
    if name not in PRESETS:
        raise UserError(f"foundation.preset: {name}: unknown preset{nearest(name, PRESETS)}")
    return dict(PRESETS[name])


def preset_config(name: str) -> OlmoeConfig:
    """Return the configuration of a preset; raises `UserError` for an unknown name."""
    return OlmoeConfig(**preset_arguments(name))
