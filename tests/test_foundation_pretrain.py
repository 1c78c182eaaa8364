"""Pre-training on the spot: learns, is deterministic, is cached by content, and leaves nothing half-written behind."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fedmoe_ds.config.foundation_section import FoundationConfig, PretrainConfig
from fedmoe_ds.data import ImageInput, digits, stdlib
from fedmoe_ds.errors import UserError
from fedmoe_ds.foundation import load_foundation, planned_task, resolve_foundation
from fedmoe_ds.foundation.builtin import pretrain
from fedmoe_ds.foundation.builtin.images import faded
from fedmoe_ds.foundation.builtin.presets import PRESETS, find_preset
from fedmoe_ds.storage import cache

STEPS = 60


@pytest.fixture(scope="module")
def some_documents() -> list[stdlib.Document]:
    return stdlib.documents()[:60]


@pytest.fixture(autouse=True)
def few_documents(monkeypatch: pytest.MonkeyPatch, some_documents: list[stdlib.Document]) -> None:
    """A part of the library is text enough for the nano preset."""
    monkeypatch.setattr(stdlib, "documents", lambda: some_documents)


def nano(cache: Path, steps: int = STEPS, threads: int = 1, preset: str = "nano-olmoe") -> FoundationConfig:
    training = PretrainConfig(steps=steps, batch_size=8, lr=1e-2, threads=threads)
    return FoundationConfig(preset=preset, cache=str(cache), pretrain=training)


def resolve(config: FoundationConfig, seed: int = 0) -> tuple[Path, list[str]]:
    lines: list[str] = []
    return resolve_foundation(config, seed, lines.append), lines


@pytest.mark.parametrize(("preset", "experts"), [("nano-olmoe", (4, 8)), ("nano-llama", (0, 0))])
def test_learns_and_is_found_again(preset: str, experts: tuple[int, int], tmp_path: Path) -> None:
    config = nano(tmp_path, preset=preset)
    state = torch.get_rng_state()
    folder, lines = resolve(config)
    assert torch.equal(state, torch.get_rng_state()), "pre-training moved the global generator"
    assert any(f"step {STEPS}/{STEPS} loss" in line for line in lines)
    record = json.loads((folder / pretrain.RECORD_FILE).read_text())
    assert len(record["losses"]) == STEPS
    assert sum(record["losses"][-10:]) / 10 < record["unigram_entropy"] - 0.3

    again, lines = resolve(config)
    assert again == folder and len(lines) == 1 and "found" in lines[0]
    assert [path.name for path in (tmp_path / "foundations").iterdir()] == [folder.name]

    foundation = load_foundation(folder, config, 1, 0, "cpu")
    assert (foundation.top_k, foundation.num_experts, foundation.vocab_size) == (*experts, 512)
    assert len(foundation.layers or foundation.sites) == 2 and foundation.sparse == bool(experts[1])
    ids = foundation.tokenizer("import os\n\ndef main():\n", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        assert (foundation.model(ids).logits - expected).abs().max() <= 1e-5


def accuracy(model: Any, images: digits.Images) -> float:
    with torch.no_grad():
        logits_NV = model(pixel_values=torch.from_numpy(images.pixels_NCHW)).logits
    return float((logits_NV.argmax(-1) == torch.from_numpy(images.labels_N)).float().mean())


def test_digits_are_learnt_and_leave_something_to_learn(tmp_path: Path) -> None:
    config = FoundationConfig(preset="nano-vit", cache=str(tmp_path), pretrain=PretrainConfig(steps=200))
    folder, lines = resolve(config)
    assert any("step 200/200 loss" in line and "images/s" in line for line in lines)
    record = json.loads((folder / pretrain.RECORD_FILE).read_text())
    own, clients = digits.split()
    assert record["images"] == len(own) and sum(record["losses"][-10:]) / 10 < 1.5
    foundation = load_foundation(folder, config, 1, 0, "cpu")
    assert foundation.tokenizer is None and foundation.task == "image_classification" and foundation.vocab_size == 0
    assert foundation.images == ImageInput(channels=1, height=8, width=8, classes=10, positions=17)
    own_print = digits.Images(faded(torch.from_numpy(own.pixels_NCHW)).numpy(), own.labels_N)
    assert accuracy(foundation.model, own_print) > 0.7
    assert 0.3 < accuracy(foundation.model, clients) < 0.9
    again, lines = resolve(config)
    assert again == folder and len(lines) == 1 and "found" in lines[0]


@pytest.mark.parametrize("preset", ["nano-olmoe", "nano-llama", "nano-vit"])
def test_same_seed_same_bits(preset: str, tmp_path: Path) -> None:
    first, _ = resolve(nano(tmp_path / "a", 2, 2, preset))
    second, _ = resolve(nano(tmp_path / "b", 2, 2, preset))
    assert first.name == second.name
    assert weights(first) == weights(second)


def test_other_seed_other_bits(tmp_path: Path) -> None:
    first, _ = resolve(nano(tmp_path, steps=0))
    other, _ = resolve(nano(tmp_path, steps=0), seed=1)
    assert first.name != other.name
    assert weights(first) != weights(other)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_every_ingredient_is_in_the_key() -> None:
    documents = stdlib.documents()[:2]
    shorter = [stdlib.Document(document.group, document.name, document.text[:-1]) for document in documents]
    config = PretrainConfig()
    tiny, small = PRESETS["tiny-olmoe"].record(), PRESETS["nano-olmoe"].record()
    keys = [
        pretrain.content_key(tiny, config, 0, documents),
        pretrain.content_key(small, config, 0, documents),
        pretrain.content_key(tiny, PretrainConfig(lr=1e-4), 0, documents),
        pretrain.content_key(tiny, PretrainConfig(threads=2), 0, documents),
        pretrain.content_key(tiny, config, 1, documents),
        pretrain.content_key(tiny, config, 0, shorter),
    ]
    assert len(set(keys)) == len(keys)
    assert keys[0] == pretrain.content_key(tiny, config, 0, documents)


def test_every_ingredient_is_in_the_key_of_an_image_foundation() -> None:
    images, other = digits.split()
    config = PretrainConfig()
    tiny, small = PRESETS["tiny-vit"].record(), PRESETS["nano-vit"].record()
    keys = [
        pretrain.image_key(tiny, config, 0, images),
        pretrain.image_key(small, config, 0, images),
        pretrain.image_key(tiny, PretrainConfig(steps=1), 0, images),
        pretrain.image_key(tiny, config, 1, images),
        pretrain.image_key(tiny, config, 0, other),
    ]
    assert len(set(keys)) == len(keys)


def test_full_disk_leaves_nothing(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # the kernel refuses to write any longer file
    try:
        with pytest.raises(UserError, match=r"^foundation\.cache: .* cannot be written"):
            resolve(nano(tmp_path, steps=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "foundations").iterdir()) == []
    folder, _ = resolve(nano(tmp_path, steps=1))
    assert (folder / "model.safetensors").is_file()


def test_cache_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(UserError, match=r"^foundation\.cache: .* cannot be written"):
        resolve(nano(tmp_path / "cache", steps=1))


def test_another_process_was_faster(tmp_path: Path) -> None:
    folder = tmp_path / "content"
    with cache.draft(folder, lambda: pretrain._usable(folder)) as draft:
        (draft / "late").write_text("")
        folder.mkdir()
        (folder / pretrain.RECORD_FILE).write_text("{}")
    assert [path.name for path in folder.iterdir()] == [pretrain.RECORD_FILE]
    assert list(tmp_path.iterdir()) == [folder]


def test_preset_shapes() -> None:
    tiny = find_preset("tiny-olmoe").config()
    assert (tiny.vocab_size, tiny.hidden_size, tiny.num_experts, tiny.num_experts_per_tok) == (2048, 128, 16, 8)
    assert not tiny.tie_word_embeddings and not tiny.norm_topk_prob
    assert PRESETS["tiny-olmoe"].record() == PRESETS["tiny-olmoe"].arguments, "the key of OLMoE presets has no family"
    families = {name: preset.config().model_type for name, preset in PRESETS.items()}
    named = {f"{size}-{family}": family for size in ("tiny", "nano") for family in ("olmoe", "llama", "vit")}
    assert families == {**named, "tiny-vit-28": "vit", "nano-vit-rgb": "vit"}


def test_the_task_is_known_before_anything_is_trained(tmp_path: Path) -> None:
    assert planned_task(FoundationConfig(preset="tiny-vit")) == "image_classification"
    assert planned_task(FoundationConfig(preset="tiny-llama")) == planned_task(FoundationConfig()) == "causal_lm"
    PRESETS["nano-vit"].config().save_pretrained(tmp_path)
    assert planned_task(FoundationConfig(path=str(tmp_path))) == "image_classification"
    assert planned_task(FoundationConfig(path="owner/some-hub-id")) is None
    with pytest.raises(UserError, match=r"^foundation\.preset: tiny-vi: unknown preset; did you mean 'tiny-vit'"):
        planned_task(FoundationConfig(preset="tiny-vi"))
