"""Tiny federation: a random OLMoE with top-8 of 16 experts, six unequal clients, two rounds in about a second."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedmoe_ds.data.tokenizer import train_tokenizer
from fedmoe_ds.randomness import generator

SAMPLES = (29, 19, 13, 9, 7, 5)
"""Rows per client before hold-outs: no two clients are equal, and the last ones have less than a batch."""

MODEL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts": 16,
    "num_experts_per_tok": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "norm_topk_prob": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}

TREE: dict[str, Any] = {
    "adapters": {"rank": 4, "alpha": 8.0},
    "federation": {"rounds": 2},
    "local": {"max_steps": 3, "batch_size": 4, "lr": 5e-3, "clip": 0.5},
    "data": {
        "template": "instruction",
        "sequence_length": 40,
        "partition": {"kind": "natural", "column": "group"},
    },
    "execution": {"micro_batch_size": 3, "reproducible": "bitwise"},
    "evaluation": {"max_sequences": 3, "batch_size": 2, "client_sequences": 1},
}


def tiny_federation(folder: Path, *changes: Mapping[str, Any]) -> dict[str, Any]:
    """Lay down a tiny model and data in a folder, unless they are there, and return the configuration of a run on them.

    Args:
        changes: nested keys to set, later ones over earlier ones: `{"local": {"max_steps": 1}}`.
    """
    import torch

    if not (folder / "data.jsonl").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with torch.random.fork_rng(devices=[]):  # the caller's draws go on as they were
            write_inputs(folder)
    return tiny_tree(folder, "tiny", *changes)


def write_inputs(root: Path, samples: tuple[int, ...] = SAMPLES, **model: Any) -> None:
    """A random model with its tokenizer in `root/model`, instructions and answers of unequal lengths in `root/data.jsonl`."""
    import torch
    from transformers import AutoModelForCausalLM, OlmoeConfig

    rows = []
    for group, count in enumerate(samples):
        for row in range(count):
            draw = generator(7, "rows", group, row)
            words = [f"w{group}{word}" for word in draw.integers(0, 12, size=int(draw.integers(3, 13)))]
            cut = int(draw.integers(1, len(words)))
            texts = {"instruction": " ".join(words[:cut]), "output": " ".join(words[cut:])}
            rows.append({"group": f"client-{group:03d}", **texts})
    (root / "data.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    torch.manual_seed(0)
    config = OlmoeConfig(**MODEL | model)
    AutoModelForCausalLM.from_config(config, trust_remote_code=False).save_pretrained(root / "model")
    train_tokenizer(["### Instruction:\n\n### Response:\n"] * 50, MODEL["vocab_size"]).save_pretrained(root / "model")


def tiny_tree(root: Path, name: str, *changes: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a run on these inputs, with nested changes, later ones over earlier ones."""
    tree = copy.deepcopy(TREE)
    tree |= {"name": name, "output": str(root / "runs"), "foundation": {"path": str(root / "model"), "cache": str(root)}}
    tree["data"]["source"] = str(root / "data.jsonl")
    for change in changes:
        _merge(tree, change)
    return tree


def _merge(tree: dict[str, Any], change: Mapping[str, Any]) -> None:
    for key, value in change.items():
        if isinstance(value, Mapping) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = copy.deepcopy(value)
