"""What a training pass keeps, counted in real passes of every family, and what the planner takes for it.

The models have the ratios of the five whose configurations are in configs/models, at a sixteenth of their widths: heads that do
not divide the model width, fewer heads for keys, latent attention, shared experts and layers without experts.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from fedmoe_ds.bench.calibration.waves import Bench
from fedmoe_ds.bench.harness.shapes import Shape
from fedmoe_ds.model.forward import AdaptedModel
from fedmoe_ds.planner.activations import kept_bytes

MODELS = Path(__file__).parents[1] / "configs" / "models"
FAMILIES = sorted(folder.name for folder in MODELS.iterdir())
SCALE, EXPERTS, LAYERS, SEQUENCES, LENGTH = 16, 16, 3, 4, 48
WIDTHS = ("hidden_size", "intermediate_size", "moe_intermediate_size", "head_dim", "q_lora_rank", "kv_lora_rank",
          "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")  # fmt: skip
TOLERANCE = 0.05


class Alive(TorchDispatchMode):
    """Storages that operations made while it was on, and which of them are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in given:
                storage = leaf.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    @property
    def bytes(self) -> int:
        return sum(size for storage, size in self.made.values() if not storage.expired())


def write_small(name: str, folder: Path) -> Shape:
    """A random model with the ratios of `configs/models/<name>`."""
    tree = json.loads((MODELS / name / "config.json").read_text())
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


def kept(bench: Bench, monkeypatch: pytest.MonkeyPatch, cap: int) -> int:
    """Bytes that the forward pass of a local step leaves behind."""
    found: list[int] = []
    real = AdaptedModel.loss

    def counted(*arguments: Any, **rest: Any) -> Any:
        with Alive() as alive:
            result = real(*arguments, **rest)
            found.append(alive.bytes)
        return result

    monkeypatch.setattr(AdaptedModel, "loss", counted)
    bench.train(SEQUENCES, LENGTH, cap)
    return found[-1]


@pytest.mark.parametrize("adapted", ["all", "none"])
@pytest.mark.parametrize("name", FAMILIES)
def test_kept_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, adapted: str) -> None:
    shape = write_small(name, tmp_path / "model")
    bench = Bench(shape, projections(name) if adapted == "all" else [], tmp_path / "model")
    found = kept(bench, monkeypatch, cap=2)
    local = bench.job.config.local.model_copy(update={"batch_size": SEQUENCES})
    job = replace(bench.job, config=bench.job.config.model_copy(update={"local": local}))
    planned = SEQUENCES * LENGTH * kept_bytes(job, LENGTH, active=2)
    assert planned == pytest.approx(found, rel=TOLERANCE), (planned / (SEQUENCES * LENGTH), found / (SEQUENCES * LENGTH))
