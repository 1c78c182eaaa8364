"""Foundation: the frozen model every client shares, found or pre-trained on rank 0 and then loaded shard by shard."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]
from huggingface_hub.file_download import repo_folder_name
from torch import nn

from fedmoe_ds.config.foundation_section import FoundationConfig
from fedmoe_ds.data import ImageInput, Task
from fedmoe_ds.distributed.stop_points import run_waiting
from fedmoe_ds.errors import UserError
from fedmoe_ds.foundation import file_sums
from fedmoe_ds.foundation.autoep import HostedLayer
from fedmoe_ds.foundation.builtin.presets import Preset, find_preset
from fedmoe_ds.foundation.builtin.pretrain import pretrain_preset
from fedmoe_ds.foundation.channel_grouping import grouped
from fedmoe_ds.foundation.channel_groups import KEY
from fedmoe_ds.foundation.conversion import converted
from fedmoe_ds.foundation.dense import DENSE, FeedForwardSite, type_task
from fedmoe_ds.foundation.expansion import Expansion
from fedmoe_ds.foundation.fingerprint import remembered_fingerprint
from fedmoe_ds.foundation.loading import Skeleton
from fedmoe_ds.foundation.mapped_weights import Memory
from fedmoe_ds.foundation.meta_model import CONFIG_FILE, first_line, is_there, read_config
from fedmoe_ds.foundation.outline import Outline, outline
from fedmoe_ds.foundation.own_code import running
from fedmoe_ds.foundation.published import PUBLISHED, Published, published_model
from fedmoe_ds.foundation.read_me import convert_read_me, converted_config
from fedmoe_ds.foundation.size import model_size
from fedmoe_ds.foundation.storage_type import storage_type
from fedmoe_ds.foundation.tokenizer import load_tokenizer
from fedmoe_ds.storage import cache
from fedmoe_ds.storage.files import expanded

_HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.jinja"]
_HUB_PICKLED = ["*.bin"]


@dataclass(frozen=True)
class Foundation:
    """A loaded foundation. `model` is in eval mode and every parameter is frozen.

    A sparse model has hosted `layers`, a dense one feed-forward `sites` and no experts; both are in depth order. An image
    classifier has `images` instead of a tokenizer and a vocabulary.
    """

    model: nn.Module
    tokenizer: Any  # None for an image classifier
    layers: list[HostedLayer]
    top_k: int
    num_experts: int
    hidden_size: int
    vocab_size: int
    fingerprint: str  # 64 hex digits; the same on every rank and for every ep_size
    path: Path
    task: Task = "causal_lm"
    sites: list[FeedForwardSite] = field(default_factory=list)
    images: ImageInput | None = None
    code: str | None = None  # digest of the Python code that its tokenizer runs
    expansion: Expansion | None = None  # where it has further layers, whose weights are clients'

    @property
    def sparse(self) -> bool:
        """Whether the model has experts of its own."""
        return bool(self.layers)

    @property
    def outline(self) -> Outline:
        """The same without its weights."""
        return Outline(self.model, self.layers, self.sites, self.task, self.images, self.expansion)


def planned_config(config: FoundationConfig) -> Any | None:
    """The transformers configuration of a run's foundation, before anything is trained or downloaded; None for a hub id.

    Raises:
        UserError: an unknown preset, or a model folder without a usable configuration.
    """
    found = None
    if config.path is None:
        found = None if config.preset is None else _preset(config.preset).config()
    elif ((folder := expanded(config.path, "foundation.path")) / CONFIG_FILE).is_file():
        found = read_config(folder)
    convert = config.convert
    # Groups of channels leave a model its family.
    return found if found is None or convert is None or convert.kind != "read-me" else converted_config(found, convert)


def planned_task(config: FoundationConfig) -> Task | None:
    """What the foundation of a run will predict, before anything is trained, downloaded or loaded; None for a hub id.

    Raises:
        UserError: an unknown preset, or a model folder without a usable configuration.
    """
    if config.path is None:
        return None if config.preset is None else type_task(_preset(config.preset).family)
    folder = expanded(config.path, "foundation.path")
    return type_task(read_config(folder).model_type) if is_there(folder / CONFIG_FILE, Path.is_file) else None


def planned_sparse(config: FoundationConfig) -> bool | None:
    """Whether the foundation of a run has experts of its own, before anything is loaded; None where nobody can know yet."""
    if config.convert is not None:
        return True
    if config.path is None:
        return None if config.preset is None else _preset(config.preset).family not in DENSE
    folder = expanded(config.path, "foundation.path")
    if not is_there(folder / CONFIG_FILE, Path.is_file):
        return None
    found = read_config(folder)
    # A dense family's folder may say that the channels of its blocks are grouped.
    return found.model_type not in DENSE or getattr(found, KEY, None) is not None


def resolve_foundation(config: FoundationConfig, seed: int, progress: Callable[[str], None]) -> Path:
    """Return a local model folder of safetensors: the given one, a hub snapshot, what these are converted into, or a preset,
    pre-trained on the spot or out of a wheel; or what `foundation.convert` makes of one of these. Rank 0 only.

    Raises:
        UserError: neither path nor preset, an unknown preset, no such folder or hub id, a layout that is not read, no network
            for a published preset, a model that cannot be converted so, or an unwritable cache.
    """
    folder = _resolve_source(config, seed, progress)
    if config.convert is None:
        return folder
    root = cache.root(config.cache)
    if config.convert.kind == "read-me":
        return convert_read_me(folder, config.convert, seed, root, progress)
    return grouped(folder, config.convert, root, progress)


def _resolve_source(config: FoundationConfig, seed: int, progress: Callable[[str], None]) -> Path:
    if config.path is not None:
        return _check_folder(
            converted(_resolve_path(config.path, config.trust_remote_code), cache.root(config.cache), progress)
        )
    if config.preset is None:
        raise UserError("foundation: neither path nor preset is set; set one of them")
    root = cache.root(config.cache)
    if config.preset in PUBLISHED:
        return published_model(config.preset, root, progress)
    return pretrain_preset(config.preset, config.pretrain, seed, root, progress)


def _preset(name: str) -> Preset | Published:
    return PUBLISHED[name] if name in PUBLISHED else find_preset(name, PUBLISHED)


def cache_folder(config: FoundationConfig, kind: str) -> Path:
    """Where entries of a kind lie (`cache.place`) under `foundation.cache`, or $FEDMOE_CACHE, or ~/.cache/fedmoe_ds.

    Raises:
        UserError: they can lie nowhere.
    """
    return cache.place(cache.root(config.cache), kind)


def open_skeleton(path: Path | str, config: FoundationConfig, ep_size: int, ep_rank: int, device: str) -> Skeleton:
    """The model in folder `path` with this rank's experts, for a kind of device, which decides what type `auto` is; still
    without memory. Every rank calls it.

    Raises:
        UserError: the folder is missing or holds no model of a known family, or ep_size does not divide its experts.
    """
    folder = _check_folder(expanded(str(path), "foundation.path"))
    return Skeleton(folder, storage_type(config, device, folder), ep_size, ep_rank, config.expand)


def load_foundation(
    path: Path | str, config: FoundationConfig, ep_size: int, ep_rank: int, device: torch.device | str
) -> Foundation:
    """Load the dense part and this rank's experts of the model in folder `path`; every rank calls it.

    Raises:
        UserError: the folder is missing or damaged, is of no known family, is a language model without a tokenizer, or its
            number of experts is not divisible by ep_size.
    """
    skeleton = open_skeleton(path, config, ep_size, ep_rank, torch.device(device).type)
    memory = skeleton.load(torch.device(device))
    digest = remembered_fingerprint(skeleton.folder, cache_folder(config, file_sums.KIND))
    return assemble(skeleton, memory, digest, torch.device(device), config.trust_remote_code)


def assemble(skeleton: Skeleton, memory: Memory, fingerprint: str, device: torch.device, trust: bool = False) -> Foundation:
    """A foundation of a skeleton and the filled memory of all of its slots; `trust` lets its tokenizer run code of the folder.

    Raises:
        UserError: a language model without a tokenizer.
    """
    layers, folder = skeleton.layers, skeleton.folder
    # A foundation has one top_k and one number of experts for all of its layers.
    assert len({(layer.top_k, layer.num_experts) for layer in layers}) <= 1
    model: Any = skeleton.bind(memory, device)
    known, size = outline(model, layers), model_size(model, layers)
    return Foundation(
        model=model,
        tokenizer=load_tokenizer(folder, model.config.vocab_size, trust) if known.task == "causal_lm" else None,
        layers=layers,
        top_k=size.top_k,
        num_experts=size.experts,
        hidden_size=size.hidden,
        vocab_size=size.vocabulary,
        fingerprint=fingerprint,
        path=folder,
        task=known.task,
        sites=known.sites,
        images=known.images,
        code=running(folder, trust),
        expansion=skeleton.expansion,
    )


def _resolve_path(path: str, trust: bool) -> Path:
    folder = expanded(str(path), "foundation.path")
    if is_there(folder):
        return folder
    # A hub id is 'name' or 'owner/name'; everything else was meant as a folder.
    if path.startswith((".", "~", "/")) or path.endswith("/") or path.count("/") > 1:
        raise UserError(f"foundation.path: {path}: no such folder; give a Hugging Face model folder or hub id")
    files = [*_HUB_FILES, "*.py"] if trust else _HUB_FILES
    snapshot = _download(path, files)
    # Most models have both kinds of weights: the pickled ones are fetched where there are no others.
    return snapshot if any(snapshot.glob("*.safetensors")) else _download(path, [*files, *_HUB_PICKLED])


def _download(hub_id: str, files: list[str]) -> Path:
    try:
        # One process of a host, or of several that share the cache, downloads; this one may wait for it.
        filled = Path(HF_HUB_CACHE, repo_folder_name(repo_id=hub_id, repo_type="model"))
        return Path(run_waiting(lambda: snapshot_download(hub_id, allow_patterns=files), [filled]))
    except (HFValidationError, HTTPError, OSError) as error:
        raise UserError(
            f"foundation.path: {hub_id}: neither a folder nor a hub model that can be reached ({first_line(error)}); "
            "check the name, or download the model and give its folder"
        ) from error


def _check_folder(folder: Path) -> Path:
    if not is_there(folder, Path.is_dir):
        raise UserError(f"foundation.path: {folder}: no such folder; give a Hugging Face model folder or hub id")
    if not is_there(folder / CONFIG_FILE, Path.is_file):
        raise UserError(f"foundation.path: {folder}: holds no {CONFIG_FILE}; give a Hugging Face model folder")
    return folder
