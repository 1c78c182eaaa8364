"""LoRA file: the tensors of `adapter_model.safetensors` in two formats, made from ours layer by layer.

Legend: E experts, R adapter rank, F expert width, I and O input and output width of a projection.

    peft        one key per expert and projection, which PEFT, vLLM and SGLang load
                A13 is ours for gate and up, so it is written twice; B13 [2F, R] is split, gate rows first
    peft-fused  PEFT's `target_parameters`: one pair for all experts of a layer
                A [E * R, I], row e * R + j;  B [O, R * E], column j * E + e

The two orders differ on purpose: PEFT reads A as (experts, rank, in) and B as (out, rank, experts).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from fedmoe_ds.adapter_formats.module_names import ModuleNames
from fedmoe_ds.model.adapter_bank import BlockSpec, lora_pairs

Format = Literal["peft", "peft-fused"]
FORMATS: tuple[Format, ...] = get_args(Format)
GATE_UP, DOWN = "experts.gate_up", "experts.down"
"""Our names of the pairs of an expert."""
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
HEAD_MODULE = "classifier"
"""What transformers calls the head of an image classifier; PEFT keeps it whole (`modules_to_save`)."""
TARGET_PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

ReadTensor = Callable[[str], Tensor]
"""Our tensor by its canonical key."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its name and shape, and how it is made from ours."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[ReadTensor], Tensor]


def lora_targets(fmt: Format, names: ModuleNames, blocks: Iterable[BlockSpec]) -> dict[str, list[str]]:
    """`target_modules` and, in the fused format, `target_parameters` of the adapter's configuration."""
    modules: list[str] = []
    parameters: list[str] = []
    for a, _ in lora_pairs(blocks):
        if not a.expert:
            modules.append(a.name.split(".")[1])
        elif fmt == "peft-fused":
            parameters = TARGET_PARAMETERS
        else:
            modules += [names.gate, names.up] if a.pair == GATE_UP else [names.down]
    return {"target_modules": modules, **({"target_parameters": parameters} if parameters else {})}


def lora_entries(fmt: Format, names: ModuleNames, blocks: Iterable[BlockSpec], experts: int, rank: int) -> Iterator[Entry]:
    """The tensors of a file in order of layers, so that a reader of ours goes through its own once.

    Args:
        blocks: of the run; what is no LoRA pair is passed over.
        experts: of a layer, all of them.
        rank: leading LoRA rows that are written.
    """
    pairs = lora_pairs(blocks)
    for layer in sorted({layer for a, _ in pairs for layer in a.layers}):
        for a, b in pairs:
            if layer not in a.layers:
                continue
            if not a.expert:
                path = names.projection(layer, *a.name.split(".")[:2])
                yield from _single(path, a.key(layer), b.key(layer), a, b, rank)
            elif fmt == "peft":
                for e in range(experts):
                    yield from _of_expert(names, layer, e, a, b, rank)
            else:
                yield from _fused(names, layer, experts, a, b, rank)


def head_entry(block: BlockSpec) -> Entry:
    """A tensor of a trained classifier, whole."""
    key, leaf = block.key(block.layers[0]), block.name.rpartition(".")[2]
    return Entry(f"{PREFIX}{HEAD_MODULE}.{leaf}", block.item, lambda read: read(key))


def _single(
    path: str, key_a: str, key_b: str, a: BlockSpec, b: BlockSpec, rank: int, rows: slice = slice(None)
) -> Iterator[Entry]:
    """A pair under one path; `rows` are those of B."""
    height = len(range(b.item[0])[rows])
    yield Entry(f"{PREFIX}{path}.lora_A.weight", (rank, a.item[1]), lambda read: read(key_a)[:rank])
    yield Entry(f"{PREFIX}{path}.lora_B.weight", (height, rank), lambda read: read(key_b)[rows, :rank])


def _of_expert(names: ModuleNames, layer: int, e: int, a: BlockSpec, b: BlockSpec, rank: int) -> Iterator[Entry]:
    ffn = b.item[0] // 2
    branches = {names.gate: slice(0, ffn), names.up: slice(ffn, 2 * ffn)} if a.pair == GATE_UP else {names.down: slice(None)}
    for name, rows in branches.items():
        yield from _single(names.expert(layer, e, name), a.key(layer, e), b.key(layer, e), a, b, rank, rows)


def _fused(names: ModuleNames, layer: int, experts: int, a: BlockSpec, b: BlockSpec, rank: int) -> Iterator[Entry]:
    path = names.fused_experts(layer) + (".base_layer" if a.pair == GATE_UP else "")
    keys_a, keys_b = ([spec.key(layer, e) for e in range(experts)] for spec in (a, b))
    shape_a, shape_b = (experts * rank, a.item[1]), (b.item[0], rank * experts)
    yield Entry(f"{PREFIX}{path}.lora_A.weight", shape_a, partial(fused_a, keys_a, rank))
    yield Entry(f"{PREFIX}{path}.lora_B.weight", shape_b, partial(fused_b, keys_b, rank))


def fused_a(keys: list[str], rank: int, read: ReadTensor) -> Tensor:
    """[E * R, I], expert slowest."""
    return torch.cat([read(key)[:rank] for key in keys])


def fused_b(keys: list[str], rank: int, read: ReadTensor) -> Tensor:
    """[O, R * E], expert fastest."""
    return torch.stack([read(key)[:, :rank] for key in keys], dim=-1).flatten(1)
