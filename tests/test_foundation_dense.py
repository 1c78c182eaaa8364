"""Dense foundations: Hugging Face's logits for every family, feed-forward sites that can be replaced, sizes, bad input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OlmoConfig,
    Qwen2Config,
    Qwen3Config,
    ViTConfig,
    ViTModel,
)

from fedmoe_ds.config.foundation_section import FoundationConfig
from fedmoe_ds.data.tokenizer import train_tokenizer
from fedmoe_ds.errors import UserError
from fedmoe_ds.foundation import Foundation, load_foundation, loading
from fedmoe_ds.foundation.size import model_size

VOCAB, HIDDEN, FFN, LAYERS = 320, 32, 48, 2
TOLERANCE = 1e-6

TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 1,
}
IMAGES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
    "image_size": 12,
    "patch_size": 4,
    "num_channels": 3,
    "num_labels": 7,
}
# Each family also stands for one way of lying on disk: several files, tied embeddings, ViT's old and new names.
FAMILIES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "llama": (lambda: LlamaConfig(**TEXT), {"max_shard_size": "30KB"}),
    "mistral": (lambda: MistralConfig(**TEXT, sliding_window=8), {}),
    "qwen2": (lambda: Qwen2Config(**TEXT, tie_word_embeddings=True), {}),
    "qwen3": (lambda: Qwen3Config(**TEXT, head_dim=16), {}),
    "olmo": (lambda: OlmoConfig(**TEXT), {}),
    "olmo2": (lambda: Olmo2Config(**TEXT), {}),
    "vit": (lambda: ViTConfig(**IMAGES), {}),
    "vit-new-names": (lambda: ViTConfig(**IMAGES), {"save_original_format": False}),
}


def inputs(family: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if family.startswith("vit"):
        return {"pixel_values": torch.randn(3, 3, 12, 12, generator=generator)}
    return {"input_ids": torch.randint(0, VOCAB, (3, 20), generator=generator)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder per family, as a user would find it."""
    root = tmp_path_factory.mktemp("dense")
    for family, (config, options) in FAMILIES.items():
        save(config(), root / family, **options)
    return root


def save(config: Any, folder: Path, **options: Any) -> None:
    """A random model of a configuration, and a tokenizer with a language model."""
    torch.manual_seed(0)
    images = config.model_type == "vit"
    factory: Any = AutoModelForImageClassification if images else AutoModelForCausalLM
    model = factory.from_config(config)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.ndim == 1 or "norm" in name:
                tensor.add_(torch.randn(tensor.shape) * 0.1)  # neutral values would hide what was never loaded
    model.save_pretrained(folder, **options)
    if not images:
        train_tokenizer(["import this"], VOCAB).save_pretrained(folder)


def load(folder: Path, **config: Any) -> Foundation:
    return load_foundation(folder, FoundationConfig(**config), 1, 0, "cpu")


def reference(folder: Path, **options: Any) -> Any:
    factory: Any = AutoModelForImageClassification if folder.name.startswith("vit") else AutoModelForCausalLM
    return factory.from_pretrained(folder, **options).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_hugging_faces(models: Path, family: str) -> None:
    foundation = load(models / family)
    theirs = reference(models / family)
    with torch.no_grad():
        logits, expected = foundation.model(**inputs(family)).logits, theirs(**inputs(family)).logits
    assert expected.abs().max() > 0.5
    assert (logits - expected).abs().max() <= TOLERANCE * expected.abs().max().clamp(min=1)
    assert not foundation.model.training and not any(p.requires_grad for p in foundation.model.parameters())
    assert not foundation.sparse and (foundation.layers, foundation.top_k, foundation.num_experts) == ([], 0, 0)
    assert [site.index for site in foundation.sites] == [0, 1] and foundation.hidden_size == HIDDEN
    assert (foundation.tokenizer is None) == (foundation.images is not None) == family.startswith("vit")


@pytest.mark.parametrize("family", FAMILIES)
def test_size(models: Path, family: str) -> None:
    foundation = load(models / family)
    size = model_size(foundation.model, [])
    assert size.dense_parameters == sum(p.numel() for p in reference(models / family).parameters())
    assert (size.pool_parameters, size.experts, size.top_k) == (0, 0, 0)
    assert (size.layers, size.hidden, size.ffn, size.bytes_per_parameter) == (LAYERS, HIDDEN, FFN, 4)
    on_meta = loading.build_on_meta(models / family, torch.float32)
    assert loading.host_model(on_meta, 1, 0) == [] and model_size(on_meta, []) == size


class Doubled(nn.Module):
    """The frozen block and as much again, as an adapter would add to it."""

    def __init__(self, frozen: nn.Module) -> None:
        super().__init__()
        self.frozen = frozen
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x_BSD: Tensor) -> Tensor:
        y_BSD: Tensor = self.frozen(x_BSD)
        self.seen.append((x_BSD, y_BSD))
        return 2 * y_BSD


@pytest.mark.parametrize("family", FAMILIES)
def test_a_replacement_is_in_the_residual_branch(models: Path, family: str) -> None:
    """Doubling the last layer's branch equals Hugging Face's model with the last projection doubled there."""
    foundation, theirs = load(models / family), reference(models / family)
    site = foundation.sites[-1]
    assert (site.hidden_size, site.ffn_hidden_size) == (HIDDEN, FFN)
    doubled = Doubled(site.module(foundation.model))
    site.replace(foundation.model, doubled)
    assert site.module(foundation.model) is doubled
    last: Any = theirs.get_submodule(site.path)
    projection = last.fc2 if family.startswith("vit") else last.down_proj
    with torch.no_grad():
        for parameter in projection.parameters():
            parameter.mul_(2)
        logits, expected = foundation.model(**inputs(family)).logits, theirs(**inputs(family)).logits
    assert (logits - expected).abs().max() <= 1e-5
    ((x_BSD, y_BSD),) = doubled.seen
    assert x_BSD.shape == y_BSD.shape == (3, 10 if family.startswith("vit") else 20, HIDDEN)
    assert (x_BSD.shape[1] == foundation.images.positions) if foundation.images else True


def test_bfloat16(models: Path) -> None:
    for family in ("llama", "vit"):
        foundation = load(models / family, dtype="bfloat16")
        assert {parameter.dtype for parameter in foundation.model.parameters()} == {torch.bfloat16}
        with torch.no_grad():
            logits = foundation.model(**inputs(family)).logits
            expected = reference(models / family, dtype=torch.bfloat16)(**inputs(family)).logits
        assert torch.equal(logits, expected)


def test_a_pooler_is_ignored_and_a_bare_encoder_refused(models: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models / "vit", tmp_path / "vit"))
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "vit.pooler.dense.weight": torch.zeros(HIDDEN, HIDDEN)}, folder / "model.safetensors")
    load(folder)
    save_file({**weights, "vit.decoder.weight": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"'vit\.decoder\.weight' has no place in a 'vit' model"):
        load(folder)
    save_file({name: tensor for name, tensor in weights.items() if "classifier" not in name}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"no tensor 'classifier\.bias' \(and 1 more\)"):
        load(folder)
    ViTModel(ViTConfig(**IMAGES)).save_pretrained(tmp_path / "headless")
    with pytest.raises(UserError, match=r"tensor 'embeddings\.cls_token' has no place in a 'vit' model"):
        load(tmp_path / "headless")


def test_a_language_model_needs_its_tokenizer(models: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models / "qwen3", tmp_path / "qwen3", ignore=shutil.ignore_patterns("tokenizer*")))
    with pytest.raises(UserError, match=r"holds no tokenizer"):
        load(folder)


def test_other_image_models_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "resnet"}))
    with pytest.raises(UserError, match=r"model_type 'resnet' is no causal language model and no ViT") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)
