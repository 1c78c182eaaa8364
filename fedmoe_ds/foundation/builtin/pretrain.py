"""Pre-training of a built-in preset on the spot: data that is on every machine, no download, cached.

Only the pre-training part of the Python standard library, or of scikit-learn's digits, is read, so that federated fine-tuning
sees documents and images that the foundation has never seen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import tokenizers
import torch
import transformers
from safetensors import SafetensorError

from fedmoe_ds.config.foundation_section import PretrainConfig
from fedmoe_ds.data import digits, stdlib
from fedmoe_ds.foundation import folder_record
from fedmoe_ds.foundation.builtin.images import INK_SHARE, train_on_images
from fedmoe_ds.foundation.builtin.loop import Progress
from fedmoe_ds.foundation.builtin.loop_state import TrainingState
from fedmoe_ds.foundation.builtin.presets import Preset, find_preset
from fedmoe_ds.foundation.builtin.text import SEQUENCE_LENGTH, train_on_text
from fedmoe_ds.storage import cache
from fedmoe_ds.storage.strict_json import tree_sha256

FORMAT_VERSION = 2
IMAGE_FORMAT_VERSION = 1
RECORD_FILE = "pretrain.json"

Train = Callable[[TrainingState], tuple[list[Any], dict[str, Any]]]
"""Trains, or goes on from a state; returns what to save in the folder, model first, and the facts of the training."""


def pretrain_preset(name: str, config: PretrainConfig, seed: int, root: Path, progress: Progress) -> Path:
    """Return the folder of a pre-trained preset (model, tokenizer, training record), trained if the cache at `root` lacks it.

    Deterministic: equal arguments, data and library versions give equal weights. A training that has to stop is kept beside the
    folder, and the next call goes on from there.

    Raises:
        UserError: unknown preset, or a cache folder that cannot be written.
        StopError: asked to stop between two steps.
    """
    key, train = _plan(find_preset(name), config, seed, root, progress)
    folder = cache.place(root, "foundations") / key
    state = TrainingState(folder.with_name(f"{key}.unfinished"), key, progress)
    with cache.storing(folder, SafetensorError):
        if _usable(folder):
            progress(f"foundation: {name} found in {folder}")
            return folder
        # Another start may have trained the same in the meantime: its folder stays, and this one is thrown away.
        with cache.draft(folder, lambda: _usable(folder)) as draft:
            trained, facts = train(state)
            record = {"preset": name, "pretrain": config.model_dump(), "seed": seed, **facts}
            _save(trained, record, draft)
    # Not earlier: until the folder is in its place, the state is all that is left of the training.
    state.remove()
    progress(f"foundation: {name} saved in {folder}")
    return folder


def _plan(preset: Preset, config: PretrainConfig, seed: int, root: Path, progress: Progress) -> tuple[str, Train]:
    """The cache key of a preset, and how to train it."""
    if preset.task == "image_classification":
        images = preset.images(root, seed)
        key = image_key(preset.record(), config, seed, images)
        return key, lambda state: train_on_images(preset, config, seed, images, progress, state)
    documents, _ = stdlib.split(stdlib.documents())
    key = content_key(preset.record(), config, seed, documents)
    texts = [document.text for document in documents]
    return key, lambda state: train_on_text(preset, config, seed, texts, progress, state)


def content_key(model: dict[str, Any], config: PretrainConfig, seed: int, documents: list[stdlib.Document]) -> str:
    """Hash of everything that determines the weights of a language model; `model` is the preset's record."""
    text = hashlib.sha256()
    for document in documents:
        # JSON keeps the borders between the three: no two documents give the same bytes.
        text.update(json.dumps([document.group, document.name, document.text]).encode())
    content = {
        "format": FORMAT_VERSION,
        "model": model,
        "pretrain": config.model_dump(),
        "sequence_length": SEQUENCE_LENGTH,
        "seed": seed,
        "text": text.hexdigest(),
        "libraries": _versions(torch, transformers, tokenizers),
    }
    return tree_sha256(content)[:32]


def image_key(model: dict[str, Any], config: PretrainConfig, seed: int, images: digits.Images) -> str:
    """Hash of everything that determines the weights of an image classifier; `model` is the preset's record."""
    content = {
        "format": IMAGE_FORMAT_VERSION,
        "model": model,
        "pretrain": config.model_dump(),
        "ink": INK_SHARE,
        "seed": seed,
        "images": images.digest(),
        "libraries": _versions(torch, transformers),
    }
    return tree_sha256(content)[:32]


def _versions(*libraries: ModuleType) -> dict[str, Any]:
    return {library.__name__: library.__version__.split(".")[:2] for library in libraries}


def _save(trained: list[Any], record: dict[str, Any], folder: Path) -> None:
    transformers.utils.logging.disable_progress_bar()
    for part in trained:
        part.save_pretrained(folder)
    transformers.utils.logging.enable_progress_bar()
    folder_record.write(folder / RECORD_FILE, record)


def _usable(folder: Path) -> bool:
    return folder_record.usable(folder / RECORD_FILE)
