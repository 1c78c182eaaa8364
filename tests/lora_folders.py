"""LoRA folders for tests: random adapters under our canonical keys, written in a format without any run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedmoe_ds.adapter_formats import Format, ModuleNames, lora_entries, lora_targets
from fedmoe_ds.adapter_formats.adapter_config import CONFIG, config_tree
from fedmoe_ds.adapter_formats.lora_file import WEIGHTS
from fedmoe_ds.model.adapter_bank import BlockSpec


def expert_blocks(layers: tuple[int, ...], rank: int, width: int, ffn: int) -> list[BlockSpec]:
    """As `model.install` makes them."""
    shapes = {
        "gate_up.lora_A": (rank, width),
        "gate_up.lora_B": (2 * ffn, rank),
        "down.lora_A": (rank, ffn),
        "down.lora_B": (width, rank),
    }
    return [BlockSpec(f"experts.{name}", layers, item, expert=True) for name, item in shapes.items()]


def projection_blocks(part: str, name: str, layers: tuple[int, ...], rank: int, shape: tuple[int, int]) -> list[BlockSpec]:
    """One projection of weight shape [O, I]."""
    halves = {"A": (rank, shape[1]), "B": (shape[0], rank)}
    return [BlockSpec(f"{part}.{name}.lora_{half}", layers, item) for half, item in halves.items()]


def random_values(blocks: list[BlockSpec], experts: int, seed: int, untrained: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """Every tensor different; B of some experts is zero."""
    source = torch.Generator().manual_seed(seed)
    values = {}
    for block in blocks:
        for layer in block.layers:
            for e in range(experts) if block.expert else [None]:
                value = torch.randn(block.item, generator=source)
                values[block.key(layer, e)] = torch.zeros_like(value) if e in untrained and block.rank_axis == 1 else value
    return values


def write_folder(
    folder: Path,
    fmt: Format,
    names: ModuleNames,
    blocks: list[BlockSpec],
    values: dict[str, Tensor],
    experts: int,
    rank: int,
    alpha: float,
    **changes: Any,
) -> Path:
    """An adapter folder as an export writes it; `changes` are further keys of its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = {entry.name: entry.make(values.__getitem__) for entry in lora_entries(fmt, names, blocks, experts, rank)}
    save_file({name: value.clone().contiguous() for name, value in entries.items()}, folder / WEIGHTS)
    tree = config_tree(lora_targets(fmt, names, blocks), rank, alpha, "base", "CAUSAL_LM")
    (folder / CONFIG).write_text(json.dumps(tree | changes))
    return folder


def edit_tensors(folder: Path, change: Any) -> None:
    """Let `change` alter the dictionary of a folder's tensors in place."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / WEIGHTS)
