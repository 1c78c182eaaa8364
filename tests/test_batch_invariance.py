"""Clients that share a pass end with the bits of clients that train alone, in every model family that may share passes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from every import every
from federations import MODEL, make_config, run_alone, write_inputs
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from fedmoe_ds.config import Config, ExecutionConfig, FoundationConfig
from fedmoe_ds.federation.run_spec import shares_passes
from fedmoe_ds.kernels.frozen_layers import INDEPENDENT
from fedmoe_ds.kernels.per_client import Segment
from fedmoe_ds.model import per_client_attention
from fedmoe_ds.model.pass_context import InTraining, Pass
from fedmoe_ds.model.per_client_attention import own_lengths

COMMON = {key: MODEL[key] for key in MODEL if key not in ("num_experts", "norm_topk_prob", "intermediate_size")}
OTHERS: dict[str, Any] = {
    "mixtral": lambda: MixtralConfig(**COMMON, intermediate_size=16, num_local_experts=16),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **COMMON, intermediate_size=32, moe_intermediate_size=16, num_experts=16, head_dim=16, norm_topk_prob=True
    ),
}
# Two heads share keys and values, and a window shorter than a sequence: what real models of these families have.
FEW = {key: COMMON[key] for key in COMMON if key != "num_experts_per_tok"} | {"num_key_value_heads": 1, "intermediate_size": 48}
DENSE: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**FEW, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**FEW, sliding_window=7),
    "olmo2": lambda: Olmo2Config(**FEW),
    "qwen2": lambda: Qwen2Config(**FEW),
    "qwen3": lambda: Qwen3Config(**FEW, head_dim=16),
}
ON_EXPERTS: dict[str, Any] = {"local": {"balance_loss": 0.01}, "adapters": {"router": "train"}}
PLAIN: dict[str, Any] = {"method": {"name": "fedit"}, "adapters": {"feed_forward": ["gate_proj", "up_proj", "down_proj"]}}


def test_olmoe_is_tested_elsewhere() -> None:
    """tests/test_topologies.py and test_isolation.py train it with one, two and all clients in flight."""
    assert {*OTHERS, *DENSE, "olmoe"} == set(INDEPENDENT)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("mixtral", "float32"),
        ("qwen3_moe", "float32"),
        ("olmoe", "bfloat16"),
        ("llama", "bfloat16"),
        *((family, "float32") for family in DENSE),
    ],
)
def test_company_leaves_no_trace(tmp_path: Path, family: str, dtype: str) -> None:
    write_inputs(tmp_path, (13, 9, 5))
    if family in OTHERS or family in DENSE:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config((OTHERS | DENSE)[family]()).save_pretrained(tmp_path / "model")
    change: dict[str, Any] = {
        "federation": {"rounds": 1},
        "execution": {"micro_batch_size": None},
        "foundation": {"dtype": dtype},
        **(PLAIN if family in DENSE else ON_EXPERTS),
    }
    results = [
        run_alone(make_config(tmp_path, f"flight-{flight}", change, {"execution": {"clients_in_flight": flight}}))
        for flight in (1, 3)
    ]
    assert every(result.parts.execution.pool.merge for result in results), "they do share passes"
    assert results[0].digest == results[1].digest
    weights = dict(results[0].parts.foundation.model.named_parameters())
    assert {str(weight.dtype) for weight in weights.values()} == {f"torch.{dtype}"}


def test_who_may_share_a_pass() -> None:
    whole = FoundationConfig(dtype="float32")
    fast, exact = (Config(foundation=whole, execution=ExecutionConfig(reproducible=mode)) for mode in ("fast", "bitwise"))
    assert shares_passes(exact, "llama", "cpu") and not shares_passes(exact, "vit", "cpu"), "plain LoRA"
    half = exact.model_copy(update={"foundation": exact.foundation.model_copy(update={"dtype": "bfloat16"})})
    assert shares_passes(exact, "olmoe", "cpu") and shares_passes(fast, "deepseek_v3", "cuda")
    assert not shares_passes(exact, "deepseek_v3", "cpu"), "its shared experts and sigmoid scores are not kept apart"
    assert shares_passes(half, "olmoe", "cpu") and not shares_passes(half, "qwen2_moe", "cpu")


def test_a_client_below_the_window_has_no_mask_in_company(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone it has none, and a kernel with a mask adds up in another order."""
    seen = []

    def kernel(module: Any, q: torch.Tensor, k: Any, v: Any, mask: Any, **options: Any) -> tuple[torch.Tensor, None]:
        seen.append((q.shape[2], mask is not None))
        return q.transpose(1, 2), None

    empty, module = torch.zeros(0), torch.nn.Module()
    run = Pass([Segment(0, 0, 1, 9), Segment(1, 1, 2, 4)], None, empty, empty, empty)
    object.__setattr__(module, per_client_attention._EXECUTION, SimpleNamespace(running=lambda: run, wave=InTraining()))
    monkeypatch.setattr(per_client_attention, "sdpa_attention_forward", kernel)
    heads, mask = torch.zeros(2, 1, 9, 8), torch.ones(1, 1, 9, 9, dtype=torch.bool)
    per_client_attention._attend(module, heads, heads, heads, mask, sliding_window=6)
    per_client_attention._attend(module, heads, heads, heads, mask, sliding_window=4)
    assert seen == [(9, True), (4, False), (9, True), (4, True)]


def test_neighbours_of_equal_length_share_a_call() -> None:
    empty = torch.zeros(0)
    run = Pass([Segment(0, 0, 2, 9), Segment(1, 2, 5, 9), Segment(3, 5, 6, 4)], None, empty, empty, empty)
    assert own_lengths(run, 6, 9) == [(0, 5, 9), (5, 6, 4)]
    assert own_lengths(Pass([], None, empty, empty, empty), 1, 1) == [(0, 1, 1)]
