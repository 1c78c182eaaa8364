"""LoRA files of other tools: what is written is read back to the bit, in the layouts that PEFT computes with, and strictly.

Legend: E experts, R adapter rank, F expert width, D model width.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from every import every
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_folders import edit_tensors, expert_blocks, projection_blocks, random_values, write_folder
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedmoe_ds.adapter_formats import FORMATS, Format, lora_entries, lora_targets, names_of, read_adapter
from fedmoe_ds.adapter_formats.adapter_config import CONFIG
from fedmoe_ds.adapter_formats.lora_file import WEIGHTS
from fedmoe_ds.adapter_formats.module_names import NAMES
from fedmoe_ds.errors import UserError

E, R, D, F, LAYERS = 5, 3, 12, 8, (1, 2)
BLOCKS = expert_blocks(LAYERS, R, D, F) + projection_blocks("attention", "q_proj", (0, *LAYERS), R, (10, D))
OLMOE, MIXTRAL = NAMES["olmoe"], NAMES["mixtral"]
EXPERT = "base_model.model.model.layers.1.mlp.experts."


@pytest.fixture
def values() -> dict[str, Tensor]:
    return random_values(BLOCKS, E, seed=0, untrained=(1, 4))


@settings(max_examples=15)
@given(
    family=st.sampled_from(sorted(NAMES)),
    fmt=st.sampled_from(FORMATS),
    sizes=st.tuples(*[st.integers(1, 6)] * 4),
    layers=st.sets(st.integers(0, 40), min_size=1, max_size=3),
    kept=st.integers(1, 6),
    seed=st.integers(0, 2**16),
)
def test_written_and_read_back_to_the_bit(
    family: str, fmt: Format, sizes: tuple[int, int, int, int], layers: set[int], kept: int, seed: int
) -> None:
    """All families, sizes and sets of layers; leading rows alone where fewer are written."""
    experts, rank, width, ffn = sizes
    places, names = tuple(sorted(layers)), NAMES[family]
    blocks = projection_blocks("attention", "o_proj", places, rank, (width, ffn))
    if "experts" in family or family in ("olmoe", "mixtral", "qwen3_moe", "deepseek_v3"):
        blocks += expert_blocks(places, rank, width, ffn)
    else:
        blocks += projection_blocks("feed_forward", "up_proj", places, rank, (ffn, width))
    values, kept = random_values(blocks, experts, seed), min(kept, rank)
    with tempfile.TemporaryDirectory() as folder:
        read = read_adapter(write_folder(Path(folder), fmt, names, blocks, values, experts, kept, 2.0 * kept))
        assert read.rank == kept and read.scale == 2.0 and set(read.shapes) == set(values) and read.base_model == "base"
        for key, value in values.items():
            expected = value[:kept] if key.endswith("_A") else value[:, :kept]
            assert torch.equal(read.read(key), expected) and read.shapes[key] == tuple(expected.shape)


def test_layout_of_single_experts(values: dict[str, Tensor]) -> None:
    """E x 3 x 2 keys a layer; A of gate and up is the same tensor, and the halves of B are its rows."""
    found = {entry.name: entry.make(values.__getitem__) for entry in lora_entries("peft", MIXTRAL, BLOCKS, E, R)}
    assert len(found) == len(LAYERS) * E * 3 * 2 + 3 * 2
    place = "base_model.model.model.layers.2.block_sparse_moe.experts.3"
    key = "layers.2.experts.3.gate_up"
    assert every(torch.equal(found[f"{place}.{name}.lora_A.weight"], values[f"{key}.lora_A"]) for name in ("w1", "w3"))
    joined = torch.cat([found[f"{place}.{name}.lora_B.weight"] for name in ("w1", "w3")])
    assert torch.equal(joined, values[f"{key}.lora_B"])
    assert torch.equal(found[f"{place}.w2.lora_B.weight"], values["layers.2.experts.3.down.lora_B"])
    assert lora_targets("peft", MIXTRAL, BLOCKS) == {"target_modules": ["w1", "w3", "w2", "q_proj"]}


def test_layout_of_fused_experts(values: dict[str, Tensor]) -> None:
    """PEFT computes `einsum("o r e, e r i -> e o i")` of B as [O, R, E] and A as [E, R, I]."""
    found = {entry.name: entry.make(values.__getitem__) for entry in lora_entries("peft-fused", OLMOE, BLOCKS, E, R)}
    for path, pair in ((".base_layer", "gate_up"), ("", "down")):
        a, b = (found[f"{EXPERT[:-1]}{path}.lora_{half}.weight"] for half in "AB")
        theirs = torch.einsum("o r e, e r i -> e o i", b.reshape(len(b), R, E), a.reshape(E, R, -1))
        for e in range(E):
            ours = values[f"layers.1.experts.{e}.{pair}.lora_B"] @ values[f"layers.1.experts.{e}.{pair}.lora_A"]
            assert torch.allclose(theirs[e], ours, atol=1e-5) and bool(ours.any()) == (e not in (1, 4))
    targets = lora_targets("peft-fused", OLMOE, BLOCKS)
    assert targets == {
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    }


def test_gate_and_up_with_an_a_of_their_own_are_joined(tmp_path: Path, values: dict[str, Tensor]) -> None:
    """Twice the rank, and the very products."""
    folder = write_folder(tmp_path, "peft", OLMOE, BLOCKS, values, E, R, 6.0)
    other = torch.randn(R, D, generator=torch.Generator().manual_seed(5))
    edit_tensors(folder, lambda tensors: tensors.update({f"{EXPERT}2.up_proj.lora_A.weight": other}))
    read, stored = read_adapter(folder), load_file(folder / WEIGHTS)
    assert read.ranks == {"attention.q_proj": R, "experts.down": R, "experts.gate_up": 2 * R} and read.rank == 2 * R
    for e in range(E):
        product = read.read(f"layers.1.experts.{e}.gate_up.lora_B") @ read.read(f"layers.1.experts.{e}.gate_up.lora_A")
        theirs = [
            stored[f"{EXPERT}{e}.{name}.lora_B.weight"] @ stored[f"{EXPERT}{e}.{name}.lora_A.weight"]
            for name in ("gate_proj", "up_proj")
        ]
        assert torch.allclose(product, torch.cat(theirs), atol=1e-6)


def test_the_doubled_rank_that_peft_gives_to_joined_gate_and_up(tmp_path: Path) -> None:
    """PEFT on transformers 5 saves what it has loaded with one key per expert so, pattern and all."""
    wide = random_values(expert_blocks((1,), 2 * R, D, F)[:2], E, 1)
    narrow = random_values(expert_blocks((1,), R, D, F)[2:], E, 2)
    for rank, part, values in ((2 * R, slice(0, 2), wide), (R, slice(2, 4), narrow)):
        write_folder(tmp_path / str(rank), "peft-fused", OLMOE, expert_blocks((1,), rank, D, F)[part], values, E, rank, 6.0)
    tensors = {**load_file(tmp_path / str(R) / WEIGHTS), **load_file(tmp_path / str(2 * R) / WEIGHTS)}
    save_file(tensors, tmp_path / str(R) / WEIGHTS)
    tree = json.loads((tmp_path / str(R) / CONFIG).read_text())
    pattern = {"rank_pattern": {r".*\.gate_up_proj": 2 * R}, "alpha_pattern": {r".*\.gate_up_proj": 12}}
    tree |= {"target_parameters": ["gate_up_proj", "down_proj"], **pattern}
    (tmp_path / str(R) / CONFIG).write_text(json.dumps(tree))
    read = read_adapter(tmp_path / str(R))
    assert read.ranks == {"experts.gate_up": 2 * R, "experts.down": R} and read.scale == 6.0 / R
    assert every(torch.equal(read.read(key), value) for key, value in {**wide, **narrow}.items())


def put(name: str, value: Tensor) -> Callable[[Any], None]:
    return lambda tensors: tensors.update({name: value})


def without(part: str) -> Callable[[Any], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if part in name]:
            del tensors[name]

    return change


REFUSED_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({"peft_type": "IA3"}, "peft_type: IA3: only LORA can be read"),
    "rslora": ({"use_rslora": True}, "use_rslora: True: changes what the adapter computes"),
    "DoRA": ({"use_dora": True}, "use_dora: True: changes what the adapter computes"),
    "unknown": ({"kasa_config": {"beta": 1}}, "kasa_config: {'beta': 1}: changes what the adapter computes"),
    "modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save: ['lm_head']: changes what"),
    "ranks": ({"rank_pattern": {"q_proj": 2}}, "rank_pattern: {'q_proj': 2}: a run has one rank and one alpha"),
    "alphas": ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern: {'q_proj': 2}: a run has one rank and one alpha"),
    "bias": ({"bias": "all"}, "bias: all: biases are not trained here"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights: pissa: it has changed the base model's weights"),
    "no rank": ({"r": "8"}, "r: 8: expected a whole number of at least 1"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha: None: expected a number above 0"),
    "parameters": ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "which are not those of the tensors"),
}
MODEL = "base_model.model.model."
REFUSED_TENSORS: dict[str, tuple[Callable[[Any], None], str]] = {
    "foreign": (put("base_model.model.lm_head.lora_A.weight", torch.ones(R, D)), "lm_head.lora_A.weight: is no LoRA tensor of"),
    "embedding": (put(f"{MODEL}embed_tokens.lora_embedding_A", torch.ones(R, D)), "is no LoRA tensor of a module"),
    "no expert": (without(f"{EXPERT}2."), "layer 1: experts.down: expert 2 is missing; all experts of a layer are needed"),
    "no B": (without(f"{EXPERT}2.up_proj.lora_B.weight"), "experts.gate_up: expert 2: up_proj: lora_B is missing"),
    "no up": (without("up_proj"), "expert 0: up_proj: lora_A is missing"),
    "no down": (without("down_proj"), "layer 1 adapts experts.gate_up and not experts.down: here experts are adapted whole"),
    "rank": (put(f"{EXPERT}2.up_proj.lora_A.weight", torch.ones(R + 1, D)), "shape (4, 12), but base_model"),
    "rank of B": (put(f"{EXPERT}2.down_proj.lora_B.weight", torch.ones(D, R + 1)), "its rank is 4, not 3; a run has one rank"),
    "height": (put(f"{EXPERT}2.up_proj.lora_B.weight", torch.ones(F + 1, R)), "shape (9, 3), but base_model"),
    "axes": (put(f"{EXPERT}2.up_proj.lora_B.weight", torch.ones(F)), "shape (8,): expected two axes"),
    "whole numbers": (put(f"{EXPERT}2.up_proj.lora_A.weight", torch.ones(R, D, dtype=torch.int8)), "are not quantised"),
    "twice": (put(f"{MODEL}layers.1.block_sparse_moe.experts.2.w1.lora_A.weight", torch.ones(R, D)), "under another name"),
    "both": (put(f"{EXPERT[:-1]}.lora_A.weight", torch.ones(E * R, F)), "has keys of single experts and of fused ones"),
    "far away": (put(f"{EXPERT}999999.up_proj.lora_A.weight", torch.ones(R, D)), "expert 5 is missing"),
    "nothing": (dict.clear, "holds no tensors"),
}


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        read_adapter(folder)
    message = str(error.value)
    assert message.startswith(f"adapters.start: {folder}") and "\n" not in message
    return message


@pytest.mark.parametrize("case", REFUSED_CONFIGS)
def test_a_configuration_that_means_more_is_refused(case: str, tmp_path: Path, values: dict[str, Tensor]) -> None:
    changes, words = REFUSED_CONFIGS[case]
    assert words in refusal(write_folder(tmp_path, "peft", OLMOE, BLOCKS, values, E, R, 6.0, **changes))


@pytest.mark.parametrize("case", REFUSED_TENSORS)
def test_tensors_that_are_not_whole_are_refused(case: str, tmp_path: Path, values: dict[str, Tensor]) -> None:
    change, words = REFUSED_TENSORS[case]
    folder = write_folder(tmp_path, "peft", OLMOE, BLOCKS, values, E, R, 6.0)
    edit_tensors(folder, change)
    assert words in refusal(folder)


def refusal_on_read(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        adapter = read_adapter(folder)
        for key in adapter.shapes:
            adapter.read(key)
    return str(error.value)


def test_damaged_files_are_refused(tmp_path: Path, values: dict[str, Tensor]) -> None:
    folder = write_folder(tmp_path / "a", "peft-fused", OLMOE, BLOCKS, values, E, R, 6.0)
    edit_tensors(folder, put(f"{EXPERT[:-1]}.lora_A.weight", torch.full((E * R, F), torch.inf)))
    assert "has numbers that are not finite" in refusal_on_read(folder)
    edit_tensors(folder, put(f"{EXPERT[:-1]}.lora_A.weight", torch.ones(E * R + 1, F)))
    assert "expected 3 rows for every expert" in refusal(folder)
    (folder / WEIGHTS).write_bytes(b"not a file of tensors")
    assert "damaged" in refusal(folder)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    assert "adapter_model.bin is a pickle and is not read" in refusal(folder)
    (folder / CONFIG).write_text("[")
    assert "cannot be read" in refusal(folder)
    (folder / CONFIG).unlink()
    assert "give a folder that PEFT has saved" in refusal(folder)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)
KEYS = ("r", "lora_alpha", "bias", "use_dora", "rank_pattern", "alpha_pattern", "target_parameters", "peft_type", "anything")


@settings(max_examples=25)
@given(
    changes=st.dictionaries(st.sampled_from((*KEYS, "init_lora_weights", "base_model_name_or_path")), json_values, max_size=3)
)
def test_any_configuration_is_read_or_refused_in_one_line(changes: dict[str, Any]) -> None:
    blocks = expert_blocks((0,), 1, 2, 2)
    with tempfile.TemporaryDirectory() as name:
        folder = write_folder(Path(name), "peft", OLMOE, blocks, random_values(blocks, 2, 0), 2, 1, 1.0, **changes)
        try:
            assert read_adapter(folder).rank == 1
        except UserError as error:
            assert str(error).startswith(f"adapters.start: {name}")


def test_a_family_without_names_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"--format: peft: the foundation is a 'minimax_m3_vl_text' model, .* use --format merged"
    ):
        names_of("minimax_m3_vl_text", "--format: peft")
