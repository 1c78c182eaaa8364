"""FLOPs of training: the cost model and the planner against torch's own counter on the plain reference models.

One sequence forward and backward, in every kind of training. The counter sees matrix products as they are called, those of
attention scores apart; the cost model adds the model's norm weights, 4 FLOPs a row each, and nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from dense_inputs import EXPERTS, TOP_K, dense_config, write_dense
from federations import make_config, write_inputs
from reference import Reference, Settings
from reference_dense import DenseReference, Text
from reference_dense import Running as DenseRunning
from reference_dense import Settings as DenseSettings
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from fedmoe_ds.planner.work import PassWork, Rows
from fedmoe_ds.planner.workload import Job, resolve

LENGTH, CAP = 9, 3
ALL = ["q_proj", "k_proj", "v_proj", "o_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "LoRA experts": {"attention": []},
    "LoRA attention": {"attention": ALL, "experts": False},
    "both": {"attention": ALL},
    "whole experts": {"attention": [], "expert_training": "full"},
    "whole experts, LoRA attention": {"attention": ALL, "expert_training": "full"},
    "trained router": {"attention": ["q_proj"], "router": "train"},
    "everything": {"attention": ALL, "expert_training": "full", "router": "train"},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flops")
    write_inputs(folder)
    write_dense(folder, ("llama",))
    return folder


def adapters_of(job: Job) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(0)
    keys = [
        (spec.key(layer, expert), spec.item)
        for spec in job.blocks
        if not spec.personal
        for layer in spec.layers
        for expert in (range(job.expert_layout.num_experts) if spec.expert else [None])
    ]
    return {key: torch.randn(item, generator=source, dtype=torch.float64).requires_grad_() for key, item in keys}


def counted(model: Any, loss: Any) -> float:
    """Matrix products of one forward and backward pass; the embedding wants its gradient, so that no layer is the lowest."""
    model.get_input_embeddings().weight.requires_grad_(True)
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    found = counter.get_flop_counts()["Global"]
    assert set(found) <= {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm}, found
    return float(found[torch.ops.aten.mm] + found.get(torch.ops.aten.addmm, 0))


def norms(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 1)


def planned(job: Job, trained: bool = True) -> float:
    """What the planner takes for the same pass; its head is on targets, so all rows are targets here."""
    work = PassWork(job, training=trained)
    both = work.home(Rows(1, LENGTH, LENGTH)) + work.experts(float(LENGTH * CAP), 1.0, job.expert_layout.num_experts)
    return float(both.flops + both.adapters)


@pytest.mark.parametrize("selective", [False, True], ids=["all", "selected"])
@pytest.mark.parametrize("kind", KINDS)
def test_sparse_models(root: Path, kind: str, selective: bool) -> None:
    job = resolve(make_config(root, "sparse", {"adapters": KINDS[kind]}))
    reference = Reference(root / "model", Settings(scale=2.0))
    reference.model.set_attn_implementation("eager")
    run = reference.start(adapters_of(job), torch.ones(1, dtype=torch.float64), CAP)
    active = set(range(5)) if selective else set(range(job.expert_layout.num_experts))
    run.active = dict.fromkeys(job.expert_layout.layers, active)
    tokens, mask = np.arange(LENGTH) + 5, np.arange(LENGTH) > 0
    found = counted(reference.model, lambda: reference.loss_sum(tokens, mask))
    routed, trained = int(run.counts.sum()), int(run.counts[:, sorted(active)].sum())
    assert routed == LENGTH * CAP * len(job.expert_layout.layers) and (trained < routed) == selective
    cost = job.cost.spent(LENGTH, routed, trained, job.config.adapters.rank)
    assert cost - 4 * LENGTH * norms(reference.model) == pytest.approx(found, rel=1e-12)
    if not selective:
        assert planned(job) == pytest.approx(cost, rel=1e-12)


def test_plain_lora_on_dense_models(root: Path) -> None:
    change = {"feed_forward": ["gate_proj", "up_proj", "down_proj"], "attention": ALL}
    job = resolve(make_config(root, "plain", {"foundation": {"path": str(root / "llama")}, "adapters": change}))
    lora = peft.LoraConfig(r=job.config.adapters.rank, target_modules=[*ALL, *change["feed_forward"]])
    loaded: Any = AutoModelForCausalLM.from_pretrained(root / "llama", attn_implementation="eager")
    model = peft.get_peft_model(loaded, lora)
    tokens = (torch.arange(LENGTH) + 5)[None]
    found = counted(model, lambda: model(input_ids=tokens).logits.sum())
    cost = job.cost.spent(LENGTH, 0, 0, job.config.adapters.rank)
    frozen = sum(parameter.numel() for parameter in loaded.parameters() if parameter.dim() == 1)
    assert cost - 4 * LENGTH * frozen == pytest.approx(found, rel=1e-12)
    assert planned(job) == pytest.approx(cost, rel=1e-12)


class Pooled(DenseReference):
    """Experts as products of matrices, which the counter sees, and not of vectors."""

    def _expert_at(self, x_D: Tensor, adapters: Any, key: str) -> Tensor:
        h_1H = x_D[None] @ adapters[f"{key}.inner.weight"].T
        outer_DH: Tensor = adapters[f"{key}.outer.weight"]
        return (torch.nn.functional.gelu(h_1H) @ outer_DH.T)[0]


@pytest.mark.parametrize("attention", [[], ["q_proj"]], ids=["alone", "with LoRA attention"])
def test_adapter_experts_beside_dense_models(root: Path, attention: list[str]) -> None:
    job = resolve(dense_config(root, "llama", "dense", {"adapters": {"attention": attention}}))
    reference = Pooled(root / "llama", DenseSettings(EXPERTS, TOP_K, "none"), {})
    reference.model.set_attn_implementation("eager")
    adapters, used = adapters_of(job), np.zeros((len(job.expert_layout.layers), EXPERTS))
    reference.running = DenseRunning(adapters, CAP, used)
    text = Text(np.arange(LENGTH) + 5, np.arange(LENGTH) > 0)
    found = counted(reference.model, lambda: reference.loss(text))
    routed = int(used.sum())
    lora = 3 * LENGTH * job.config.adapters.rank * job.cost.dense_row  # this reference has no attention adapters
    cost = job.cost.spent(LENGTH, routed, routed, job.config.adapters.rank)
    assert cost - lora - 4 * LENGTH * norms(reference.model) == pytest.approx(found, rel=1e-12)
    assert planned(job) == pytest.approx(cost, rel=1e-12)


def test_recomputation_is_time_and_no_cost(root: Path) -> None:
    """Activation checkpointing runs forward twice: the planner's seconds know, the FLOPs of a client do not."""
    plain, again = (
        resolve(make_config(root, f"again-{on}", {"execution": {"activation_checkpointing": on}})) for on in (False, True)
    )
    assert again.cost == plain.cost
    assert planned(again) - planned(plain) == pytest.approx(planned(plain, trained=False), rel=1e-12)
