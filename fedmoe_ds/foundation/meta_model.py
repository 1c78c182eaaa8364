"""Meta model: a model of a folder's configuration without memory, and its experts hosted."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification

from fedmoe_ds.config.foundation_section import ExpandConfig
from fedmoe_ds.errors import UserError
from fedmoe_ds.foundation import pre_gate
from fedmoe_ds.foundation.autoep import HostedLayer, host_experts
from fedmoe_ds.foundation.channel_groups import host_groups
from fedmoe_ds.foundation.dense import is_dense, type_task
from fedmoe_ds.foundation.expansion import check_parts, expand
from fedmoe_ds.storage.strict_json import read_json

CONFIG_FILE = "config.json"
_LARGEST = {r"num_hidden_layers": 1000, r"(num|n)_\w*experts": 2**13, r"\w*_dim": 2**20, r"\w*_size": 2**31}
"""What no model has more of: a damaged number must not cost hours or the memory of the machine before it is noticed."""


def is_there(path: Path, kind: Callable[[Path], bool] = Path.exists) -> bool:
    """Whether a file or folder exists, or one of this kind.

    Raises:
        UserError: a folder above it may not be entered, so that nobody can know.
    """
    try:
        return kind(path)
    except OSError as error:
        raise UserError(
            f"foundation.path: {path}: cannot be read: {error.strerror}; give this user the right to read it"
        ) from error


def read_config(folder: Path) -> Any:
    """The transformers configuration of a model folder.

    Raises:
        UserError: it is missing, damaged, or of no model that transformers knows.
    """
    try:
        read_json(folder / CONFIG_FILE, constants=True)  # what transformers takes, others that read it again may not
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises all kinds, for a wrong type of a field as for a damaged file
        _refuse_own_code(folder, error)
        raise UserError(
            f"foundation.path: {folder}: {CONFIG_FILE} cannot be used: {first_line(error)}; mend it, or get it again"
        ) from error
    _check_sizes(folder, config)
    return config


def _check_sizes(folder: Path, config: Any) -> None:
    for name, value in vars(config).items():
        for pattern, most in _LARGEST.items():
            if isinstance(value, int) and value > most and re.fullmatch(pattern, name):
                raise UserError(
                    f"foundation.path: {folder}: {CONFIG_FILE}: {name}: {value}: expected at most {most}; get it again"
                )


def build_on_meta(folder: Path, dtype: torch.dtype, asked: ExpandConfig | None = None) -> Any:
    """Build the model of `folder/config.json` with its parameters on the meta device and its buffers on the CPU.

    Args:
        asked: further layers.
    """
    config = read_config(folder)
    if getattr(config, "quantization_config", None):
        raise UserError(
            f"foundation.path: {folder}: the weights are quantised; give a model that is not: "
            "the one it was made of, or for bitsandbytes what AutoModelForCausalLM.from_pretrained(folder).dequantize() saves"
        )
    if asked is not None:
        expand(config, asked, str(folder))
    factory: Any = AutoModelForImageClassification
    if type_task(config.model_type) == "causal_lm":
        factory = AutoModelForCausalLM
        config.use_cache = False  # nothing here generates text token by token
        config.output_router_logits = False  # the hosted router reports its logits itself, not through transformers
    try:
        # Some buffers (rotary tables) are in no checkpoint: they are computed here, in real memory.
        with init_empty_weights(include_buffers=False):
            model = factory.from_config(config, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False)
    except Exception as error:
        _refuse_own_code(folder, error)
        if not isinstance(error, ValueError):  # sizes that no layer can have: asserted, divided by, looked up
            raise UserError(
                f"foundation.path: {folder}: {CONFIG_FILE} describes no model that can be built: {first_line(error)}; mend it, "
                "or get it again"
            ) from error
        raise UserError(
            f"foundation.path: {folder}: model_type '{config.model_type}' is no causal language model and no ViT: "
            f"{first_line(error)}"
        ) from error
    # from_config leaves it empty; messages of other modules name the folder by it.
    model.config._name_or_path = str(folder)
    if asked is not None:
        check_parts(model, str(folder))
    pre_gate.attach(model, dtype)
    return model


def _refuse_own_code(folder: Path, error: Exception) -> None:
    """Raise UserError where transformers wants to run Python code of the folder (`own_code.py` says why it never may)."""
    if "trust_remote_code" in str(error):
        raise UserError(
            f"foundation.path: {folder}: its model is Python code of this folder, and a model's code is never run; give a "
            "model of a family that transformers has"
        ) from error


def host_model(model: Any, ep_size: int, ep_rank: int) -> list[HostedLayer]:
    """Host the experts of a sparse model; of a dense one there are none but groups of channels. Freezes the model; see
    `host_experts`."""
    if is_dense(model):
        model.requires_grad_(False)
        return host_groups(model, ep_size, ep_rank)
    try:
        return host_experts(model, ep_size, ep_rank)
    except (TypeError, AttributeError, LookupError, ArithmeticError) as error:  # a field that transformers has not looked at
        raise UserError(
            f"foundation.path: {model.config._name_or_path}: {CONFIG_FILE} describes no experts that can be hosted: "
            f"{first_line(error)}; mend it, or get it again"
        ) from error


def first_line(error: BaseException) -> str:
    """What an error says, in one line: its first, with the next one where that ends in a colon, and its kind if that tells."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    known = isinstance(error, OSError | ValueError) and said
    return (said if known else f"{type(error).__name__}: {said}").rstrip(": ")
