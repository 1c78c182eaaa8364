"""Random weights of OLMoE-1B-7B in the hub's layout: bfloat16 shards with an index, every expert's matrices by themselves.

Written shard by shard, so that never more than a layer is in memory: transformers would have to build all 14 GB first.

Legend: D model width, F expert width, E experts, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fedmoe_ds.bench.harness.command import Note
from fedmoe_ds.config.shipped import FOLDER
from fedmoe_ds.storage.files import write_whole

Shapes = dict[str, tuple[int, ...]]

SHAPE = FOLDER / "models" / "olmoe-1b-7b" / "config.json"


def full_size(layers: int) -> dict[str, object]:
    """The model's own `config.json`, with fewer layers where they are asked for."""
    return {**json.loads(SHAPE.read_text(encoding="utf-8")), "num_hidden_layers": layers, "dtype": "bfloat16"}


def shards(config: dict[str, object]) -> Iterator[Shapes]:
    """Name and shape of every tensor, as the hub's files call them: one shard per layer, then what is outside of them."""
    hidden, ffn, experts, vocab = (
        int(str(config[key])) for key in ("hidden_size", "intermediate_size", "num_experts", "vocab_size")
    )
    for layer in range(int(str(config["num_hidden_layers"]))):
        found: Shapes = {f"self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        # OLMoE's attention norms span all heads; of its heads as many are keys as queries.
        found |= {f"self_attn.{name}_norm.weight": (hidden,) for name in "qk"}
        found |= {f"{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        found["mlp.gate.weight"] = (experts, hidden)
        for expert in range(experts):
            found |= {f"mlp.experts.{expert}.{name}_proj.weight": (ffn, hidden) for name in ("gate", "up")}
            found[f"mlp.experts.{expert}.down_proj.weight"] = (hidden, ffn)
        yield {f"model.layers.{layer}.{name}": shape for name, shape in found.items()}
    yield {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def weight_bytes(config: dict[str, object]) -> int:
    """Of all shards."""
    return sum(2 * torch.Size(shape).numel() for shard in shards(config) for shape in shard.values())


def write_weights(config: dict[str, object], seed: int, folder: Path, note: Note) -> None:
    """Write all shards and their index into the folder of the model."""
    generator = torch.Generator().manual_seed(seed)
    found = list(shards(config))
    where: dict[str, str] = {}
    for place, shard in enumerate(found, start=1):
        name = f"model-{place:05d}-of-{len(found):05d}.safetensors"
        note(f"writing {name}")
        save_file({key: _drawn(key, shape, generator) for key, shape in shard.items()}, folder / name, {"format": "pt"})
        where |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": weight_bytes(config)}, "weight_map": where}
    write_whole(folder / "model.safetensors.index.json", json.dumps(index, indent=1))


def _drawn(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=torch.bfloat16)
    # The published initialiser range, which keeps activations of 16 layers of random weights finite.
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, 0.02, generator=generator)
