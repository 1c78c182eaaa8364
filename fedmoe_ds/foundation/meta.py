"""Meta: a model of a folder's configuration without memory, and its experts hosted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification

from fedmoe_ds.errors import UserError
from fedmoe_ds.foundation.dense import is_dense, type_task
from fedmoe_ds.foundation.hosting import HostedLayer, host_experts

CONFIG_FILE = "config.json"


def read_config(folder: Path) -> Any:
    """The transformers configuration of a model folder."""
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"foundation.path: {folder}: {CONFIG_FILE} cannot be used: {first_line(error)}") from error


def build_on_meta(folder: Path, dtype: torch.dtype) -> Any:
    """Build the model of `folder/config.json` with its parameters on the meta device and its buffers on the CPU."""
    config = read_config(folder)
    if getattr(config, "quantization_config", None):
        raise UserError(f"foundation.path: {folder}: the weights are quantised; give a model that is not")
    factory: Any = AutoModelForImageClassification
    if type_task(config.model_type) == "causal_lm":
        factory = AutoModelForCausalLM
        config.use_cache = False
        config.output_router_logits = False  # the hosted router reports its logits itself, not through transformers
    try:
        with init_empty_weights(include_buffers=False):
            model = factory.from_config(config, dtype=dtype, attn_implementation="sdpa")
    except ValueError as error:
        raise UserError(
            f"foundation.path: {folder}: model_type '{config.model_type}' is no causal language model and no ViT: "
            f"{first_line(error)}"
        ) from error
    model.config._name_or_path = str(folder)
    return model


def host_model(model: Any, ep_size: int, ep_rank: int) -> list[HostedLayer]:
    """Host the experts of a sparse model; of a dense one there are none. Freezes the model; see `host_experts`."""
    if not is_dense(model):
        return host_experts(model, ep_size, ep_rank)
    model.requires_grad_(False)
    return []


def first_line(error: Exception) -> str:
    """The first line of an error's message, for a one-line report."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
