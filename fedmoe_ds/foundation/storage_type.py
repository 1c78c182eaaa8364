"""Storage type: what type a run keeps the frozen weights in, and what `foundation.dtype: auto` means.

Auto is float32 on a CPU. On a CUDA device it is bfloat16 where the model itself is stored so (`dtype` in its config.json): half
the memory, and the only type of which such a device multiplies groups at its full rate. Any other model is float32 there, too.
A run resolves it once, and writes down what it has resolved it to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fedmoe_ds.config.foundation_section import FoundationConfig
from fedmoe_ds.foundation.meta_model import read_config

_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolved(config: FoundationConfig, device: str, model: Any) -> FoundationConfig:
    """The section with a type in place of `auto`; as it was while nobody knows the model.

    Args:
        device: kind of device, `cpu` or `cuda`.
        model: its transformers configuration; None: not known yet, a hub id.
    """
    if config.dtype != "auto" or (model is None and device != "cpu"):
        return config
    # transformers gives a type of torch's, or the word of the file.
    halves = device != "cpu" and str(getattr(model, "dtype", None)).removeprefix("torch.") == "bfloat16"
    return of_type(config, torch.bfloat16 if halves else torch.float32)


def of_type(config: FoundationConfig, dtype: torch.dtype) -> FoundationConfig:
    """The section of a model that has been built in a type, in place of `auto`."""
    if config.dtype != "auto":
        return config
    return config.model_copy(update={"dtype": "bfloat16" if dtype == torch.bfloat16 else "float32"})


def storage_type(config: FoundationConfig, device: str, folder: Path) -> torch.dtype:
    """The type of the frozen weights of the model in `folder`.

    Raises:
        UserError: its configuration cannot be used.
    """
    needed = config.dtype == "auto" and device != "cpu"
    return _TYPES[resolved(config, device, read_config(folder) if needed else None).dtype]
