"""Small federations on dense models: a random Llama on the texts of `federations`, a random ViT on the built-in digits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from federations import MODEL, SAMPLES, make_config, write_inputs
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    LlamaConfig,
    Olmo2Config,
    Qwen2Config,
    ViTConfig,
)

from fedmoe_ds.config import Config

EXPERTS, WIDTH, TOP_K = 8, 12, 4
"""Adapter experts per block, their width, and the largest budget; the default tiers are then 4, 2 and 1."""

TEXT: dict[str, Any] = {
    **{key: value for key, value in MODEL.items() if "expert" not in key and key != "norm_topk_prob"},
    "intermediate_size": 48,
}
IMAGES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
    "num_channels": 1,
    "image_size": 8,
    "patch_size": 2,
    "num_labels": 10,
}
FAMILIES: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "llama": (LlamaConfig, TEXT),
    "qwen2": (Qwen2Config, TEXT),
    "olmo2": (Olmo2Config, TEXT),
    "vit": (ViTConfig, IMAGES),
}
SEEING: dict[str, tuple[type[Any], dict[str, Any]]] = {"vit-rgb": (ViTConfig, IMAGES | {"num_channels": 3})}
"""Of images in colours, which digits are in some forms alone."""

TREE: dict[str, Any] = {
    "adapters": {"attention": [], "moe": {"experts": EXPERTS, "width": WIDTH, "top_k": TOP_K}},
    "method": {"name": "fft-moe"},
    "local": {"max_steps": 3, "batch_size": 4, "lr": 5e-3, "clip": 0.5},
    "execution": {"micro_batch_size": None},
}
DIGITS: dict[str, Any] = {
    "source": "digits",
    "template": "text",
    "max_samples": 40,
    "partition": {"kind": "dirichlet", "clients": 6, "alpha": 0.5, "column": None},
}


def write_dense(root: Path, families: tuple[str, ...] = ("llama", "vit"), samples: tuple[int, ...] = SAMPLES) -> None:
    """Models in `root/<family>` with their tokenizer, texts in `root/data.jsonl`."""
    write_inputs(root, samples)
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    for family in families:
        make, shape = (FAMILIES | SEEING)[family]
        torch.manual_seed(0)
        factory: Any = AutoModelForImageClassification if family.startswith("vit") else AutoModelForCausalLM
        factory.from_config(make(**shape)).save_pretrained(root / family)
        if not family.startswith("vit"):
            tokenizer.save_pretrained(root / family)


def dense_config(root: Path, family: str, name: str, *changes: dict[str, Any]) -> Config:
    """FFT-MoE on one of the models, with nested changes, later ones over earlier ones."""
    base = copy.deepcopy(TREE | ({"data": DIGITS} if family.startswith("vit") else {}))  # later changes are merged into it
    return make_config(root, f"{family}-{name}", base, {"foundation": {"path": str(root / family)}}, *changes)
