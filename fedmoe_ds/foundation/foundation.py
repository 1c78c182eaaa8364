"""Foundation: the frozen model every client shares, found or pre-trained on rank 0 and then loaded shard by shard."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from httpx import HTTPError
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch import nn
from transformers import AutoTokenizer

from fedmoe_ds.config.tree import FoundationConfig
from fedmoe_ds.errors import UserError
from fedmoe_ds.foundation.hosting import HostedLayer
from fedmoe_ds.foundation.loading import CONFIG_FILE, WeightFiles, first_line, load_model
from fedmoe_ds.foundation.pretrain import pretrain_preset

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_HUB_FILES = ["*.safetensors", "*.json"]


@dataclass(frozen=True)
class Foundation:
    """A loaded foundation. `model` is in eval mode and every parameter is frozen; `layers` are in depth order."""

    model: nn.Module
    tokenizer: Any
    layers: list[HostedLayer]
    top_k: int
    num_experts: int
    hidden_size: int
    vocab_size: int
    fingerprint: str  # 64 hex digits; the same on every rank and for every ep_size
    path: Path


def resolve_foundation(config: FoundationConfig, seed: int, progress: Callable[[str], None]) -> Path:
    """Return a local model folder: the given one, a hub snapshot, or a preset pre-trained on the spot. Rank 0 only.

    Raises:
        UserError: neither path nor preset, an unknown preset, no such folder or hub id, or an unwritable cache.
    """
    if config.path is not None:
        return _resolve_path(config.path)
    if config.preset is None:
        raise UserError("foundation: neither path nor preset is set; set one of them")
    return pretrain_preset(config.preset, config.pretrain, seed, cache_folder(config), progress)


def cache_folder(config: FoundationConfig) -> Path:
    """`foundation.cache`, or $FEDMOE_CACHE, or ~/.cache/fedmoe_ds."""
    return Path(config.cache or os.environ.get("FEDMOE_CACHE") or "~/.cache/fedmoe_ds").expanduser()


def load_foundation(
    path: Path | str, config: FoundationConfig, ep_size: int, ep_rank: int, device: torch.device | str
) -> Foundation:
    """Load the dense part and this rank's experts of the model in folder `path`; every rank calls it.

    Raises:
        UserError: the folder is missing or damaged, is no mixture-of-experts causal LM, has no tokenizer, or its number
            of experts is not divisible by ep_size.
    """
    folder = _check_folder(Path(path).expanduser())
    model, layers = load_model(folder, _DTYPES[config.dtype], ep_size, ep_rank, torch.device(device))
    first = layers[0]
    assert all((layer.top_k, layer.num_experts) == (first.top_k, first.num_experts) for layer in layers)
    model_config: Any = model.config
    return Foundation(
        model=model,
        tokenizer=load_tokenizer(folder, model_config.vocab_size),
        layers=layers,
        top_k=first.top_k,
        num_experts=first.num_experts,
        hidden_size=first.hidden_size,
        vocab_size=model_config.vocab_size,
        fingerprint=fingerprint(folder),
        path=folder,
    )


def fingerprint(folder: Path) -> str:
    """SHA-256 over the model's config and the name, size and SHA-256 of each of its weight files."""
    digest = hashlib.sha256()
    config = json.loads((folder / CONFIG_FILE).read_text())
    digest.update(json.dumps(config, sort_keys=True).encode())
    for file in WeightFiles(folder).paths:
        digest.update(f"\n{file.name} {file.stat().st_size} {_file_sha256(file)}".encode())
    return digest.hexdigest()


def _file_sha256(file: Path) -> str:
    blob = file.resolve()
    # The hub cache stores large files under their own SHA-256, checked at download: no need to read them again.
    if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return blob.name
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _resolve_path(path: str) -> Path:
    folder = Path(path).expanduser()
    if folder.exists():
        return _check_folder(folder)
    # A hub id is 'name' or 'owner/name'; everything else was meant as a folder.
    if path.startswith((".", "~", "/")) or path.endswith("/") or path.count("/") > 1:
        raise UserError(f"foundation.path: {path}: no such folder; give a Hugging Face model folder or hub id")
    return _download(path)


def _download(hub_id: str) -> Path:
    try:
        return Path(snapshot_download(hub_id, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, HFValidationError, HTTPError, OSError) as error:
        raise UserError(
            f"foundation.path: {hub_id}: neither a folder nor a hub model that can be reached ({first_line(error)}); "
            "check the name, or download the model and give its folder"
        ) from error


def _check_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise UserError(f"foundation.path: {folder}: no such folder; give a Hugging Face model folder or hub id")
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"foundation.path: {folder}: holds no {CONFIG_FILE}; give a Hugging Face model folder")
    return folder


def load_tokenizer(folder: Path, vocab_size: int) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"foundation.path: {folder}: its tokenizer cannot be loaded: {first_line(error)}") from error
    # Without any of its files transformers returns an empty tokenizer instead of an error.
    if not any((folder / file).is_file() for file in tokenizer.vocab_files_names.values()):
        raise UserError(f"foundation.path: {folder}: holds no tokenizer; save the model's tokenizer in the same folder")
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"foundation.path: {folder}: the tokenizer has {len(tokenizer)} tokens, the model only {vocab_size}; "
            "tokenizer and weights belong to different models"
        )
    return tokenizer
