"""Small models: random ones with the ratios of those of configs/models, at a sixteenth of their widths."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fedmoe_ds.bench.harness.shapes import Shape

FOLDER = Path(__file__).parents[1] / "configs" / "models"
MODELS = sorted(folder.name for folder in FOLDER.iterdir())
SCALE, EXPERTS, LAYERS = 16, 16, 3
WIDTHS = ("hidden_size", "intermediate_size", "moe_intermediate_size", "head_dim", "q_lora_rank", "kv_lora_rank",
          "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")  # fmt: skip


def write_small(name: str, folder: Path) -> Shape:
    """A random model with the ratios of `configs/models/<name>`."""
    tree = json.loads((FOLDER / name / "config.json").read_text())
    tree |= {key: tree[key] // SCALE for key in WIDTHS if tree.get(key)}
    tree |= {key: EXPERTS for key in ("num_experts", "num_local_experts", "n_routed_experts") if key in tree}
    tree |= {"num_hidden_layers": LAYERS, "vocab_size": 320, "max_position_embeddings": 512, "bos_token_id": 1,
             "eos_token_id": 2, "pad_token_id": 0, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}  # fmt: skip
    if tree.get("first_k_dense_replace"):
        tree["first_k_dense_replace"] = 1
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tree))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    top_k = tree["num_experts_per_tok"]
    return Shape(name, EXPERTS, tree["hidden_size"], 0, LAYERS, tree["num_attention_heads"], 320, top_k)


def projections(name: str) -> list[str]:
    """All of attention's."""
    if not name.startswith("deepseek"):
        return ["q_proj", "k_proj", "v_proj", "o_proj"]
    query = ["q_proj"] if name == "deepseek-v2-lite" else ["q_a_proj", "q_b_proj"]
    return [*query, "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
