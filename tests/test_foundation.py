"""Foundations of every family: Hugging Face's logits at ep_size 1, 2, 4, the right experts on each rank, bad input."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import RankError, run_distributed
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    GPT2Config,
    MiniMaxM3VLTextConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3_5MoeTextConfig,
    Qwen3MoeConfig,
)

from fedmoe_ds.config.adapters_section import AdapterConfig
from fedmoe_ds.config.foundation_section import FoundationConfig
from fedmoe_ds.data.tokenizer import train_tokenizer
from fedmoe_ds.distributed import process_groups
from fedmoe_ds.errors import UserError
from fedmoe_ds.foundation import Foundation, autoep, load_foundation, loading, resolve_foundation, weight_files
from fedmoe_ds.foundation.families import FAMILIES as FAMILY_TABLE
from fedmoe_ds.model.lora_linear import find_projections

VOCAB, HIDDEN, FFN, EXPERTS = 320, 32, 16, 8
TOLERANCE = 1e-5

# The wide initialisation makes experts and routing matter: logits are of order 1 to 10, a wrong expert is plainly seen.
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 1,
}
DEEPSEEK: dict[str, Any] = {
    **COMMON,
    "intermediate_size": 48,
    "moe_intermediate_size": FFN,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.7,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
QWEN: dict[str, Any] = {**COMMON, "moe_intermediate_size": FFN, "num_experts": EXPERTS, "num_experts_per_tok": 3}
MINIMAX: dict[str, Any] = {
    **COMMON,
    "intermediate_size": FFN,
    "dense_intermediate_size": 48,
    "shared_intermediate_size": 24,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 3,
    "head_dim": 16,
    "rotary_dim": 8,
    "swiglu_limit": 0.5,  # cuts off every other value
    "mlp_layer_types": ["dense", "sparse"],
}
QWEN35: dict[str, Any] = {
    **QWEN,
    "shared_expert_intermediate_size": 24,
    "head_dim": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
OLMOE: dict[str, Any] = {**COMMON, "intermediate_size": FFN, "num_experts": EXPERTS, "num_experts_per_tok": 4}

# Each family also stands for one way of lying on disk: names per expert, Mixtral's names, fused tensors, several files.
FAMILIES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "olmoe": (lambda: OlmoeConfig(**OLMOE), {}),
    "olmoe-normalised": (lambda: OlmoeConfig(**OLMOE, norm_topk_prob=True), {"max_shard_size": "30KB"}),
    "mixtral": (
        lambda: MixtralConfig(
            **COMMON, intermediate_size=FFN, num_local_experts=EXPERTS, num_experts_per_tok=2, tie_word_embeddings=True
        ),
        {},
    ),
    "qwen3_moe": (
        lambda: Qwen3MoeConfig(**QWEN, intermediate_size=48, head_dim=16, norm_topk_prob=True),
        {"save_original_format": False},
    ),
    "qwen2_moe": (lambda: Qwen2MoeConfig(**QWEN, intermediate_size=48, shared_expert_intermediate_size=24), {}),
    "deepseek_v2": (lambda: DeepseekV2Config(**DEEPSEEK, topk_method="group_limited_greedy"), {}),
    "deepseek_v2-greedy": (lambda: DeepseekV2Config(**DEEPSEEK, topk_method="greedy"), {"save_original_format": False}),
    "minimax_m3": (lambda: MiniMaxM3VLTextConfig(**MINIMAX), {}),
    "qwen3_5_moe": (lambda: Qwen3_5MoeTextConfig(**QWEN35), {"save_original_format": False}),
    "deepseek_v3": (lambda: DeepseekV3Config(**DEEPSEEK), {"max_shard_size": "40KB"}),
}


def inputs() -> torch.Tensor:
    return torch.randint(0, VOCAB, (3, 20), generator=torch.Generator().manual_seed(1))


def save_model(config: Any, folder: Path, **options: Any) -> Any:
    """Save a random model as a user would find it; return it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "norm" in name or "e_score_correction_bias" in name:
                tensor.add_(torch.randn(tensor.shape) * 0.1)  # neutral values would hide a tensor that was never loaded
    model.save_pretrained(folder, **options)
    return model


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder per family, with the reference logits and weights of Hugging Face's own model beside it."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(["import this"], VOCAB)
    for family, (config, options) in FAMILIES.items():
        model = save_model(config(), root / family, **options)
        tokenizer.save_pretrained(root / family)
        with torch.no_grad():
            logits = model(inputs()).logits
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        save_file({"logits": logits, **weights}, root / f"{family}.reference")
    return root


def expected_bytes(reference: dict[str, torch.Tensor], ep_size: int, tied: bool) -> int:
    total = 0
    for name, tensor in reference.items():
        if name != "logits" and not (tied and name == "lm_head.weight"):
            total += tensor.nbytes // (ep_size if ".mlp.experts." in name else 1)
    return total


def check_against_reference(root: Path, family: str, ep_size: int, ep_rank: int) -> None:
    reference = load_file(root / f"{family}.reference")
    foundation = load_foundation(root / family, FoundationConfig(), ep_size, ep_rank, "cpu")
    with torch.no_grad():
        logits = foundation.model(inputs()).logits
    assert logits.abs().max() > 0.5
    difference = (logits - reference["logits"]).abs().max().item()
    assert difference <= TOLERANCE, (family, ep_size, difference)
    for layer in foundation.layers:
        local = EXPERTS // ep_size
        assert layer.experts == range(ep_rank * local, (ep_rank + 1) * local)
        source = layer.source_names[f"{layer.name}.experts."]
        chosen = slice(layer.experts.start, layer.experts.stop)
        assert torch.equal(layer.w13, reference[f"{source}gate_up_proj"][chosen])
        assert torch.equal(layer.w2, reference[f"{source}down_proj"][chosen])
        assert layer.module.experts.w1.data_ptr() == layer.w13.data_ptr()
        assert torch.equal(torch.cat([layer.module.experts.w1, layer.module.experts.w3], 1), layer.w13)
    tensors = [*foundation.model.parameters(), *persistent_buffers(foundation)]
    held = sum(tensor.nbytes for tensor in tensors)
    assert held == expected_bytes(reference, ep_size, foundation.model.config.tie_word_embeddings), (family, ep_size)
    assert not any(parameter.requires_grad for parameter in foundation.model.parameters())
    assert not foundation.model.training
    assert foundation.sparse and foundation.sites == [] and foundation.task == "causal_lm"


def persistent_buffers(foundation: Foundation) -> list[torch.Tensor]:
    names = foundation.model.state_dict().keys()
    return [buffer for name, buffer in foundation.model.named_buffers() if name in names]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_rank_without_a_world(models: Path, family: str) -> None:
    check_against_reference(models, family, 1, 0)


def every_family_at_every_size(rank: int, root: Path) -> list[Any]:
    for family in FAMILIES:
        for ep_size in (1, 2, 4):
            check_against_reference(root, family, ep_size, rank % ep_size)
    foundation = load_foundation(root / "olmoe", FoundationConfig(), 4, rank, "cpu")
    groups = [torch.distributed.get_process_group_ranks(group) for group in process_groups.create_groups(2)]
    # What else the process takes at that moment (a library's buffers, a thread's stack) only adds, and not every time.
    growth, bound = min(peak_growth(root, rank) for _ in range(3))
    assert growth <= bound, f"loading took {growth / 2**20:.1f} MiB, allowed are {bound / 2**20:.1f}"
    return [foundation.fingerprint, *groups]


def peak_growth(root: Path, rank: int) -> tuple[int, int]:
    """Host memory that loading a model with 64 MiB of experts over 4 ranks takes at its peak, and the allowed bytes."""
    weight_files._BYTES_PER_OPEN = 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak restarts at the present size
    before = status_bytes("VmHWM")
    model, layers = loading.load_model(root / "large", torch.float32, 4, rank, torch.device("cpu"))
    held = sum(parameter.nbytes for parameter in model.parameters())
    assert sum(layer.w13.nbytes + layer.w2.nbytes for layer in layers) == LARGE_EXPERT_BYTES // 4
    return status_bytes("VmHWM") - before, held + 12 * 2**20


def status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)


LARGE = {**OLMOE, "hidden_size": 128, "intermediate_size": 85 * 4, "num_experts": 64}
LARGE_EXPERT_BYTES = 2 * 64 * 3 * 128 * 340 * 4


@pytest.mark.cluster
def test_four_ranks(models: Path) -> None:
    save_model(OlmoeConfig(**LARGE), models / "large")
    results = run_distributed(every_family_at_every_size, 4, models)
    assert len({result[0] for result in results}) == 1, "the fingerprint depends on the rank"
    assert [result[1] for result in results] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [result[2] for result in results] == [[0, 2], [1, 3], [0, 2], [1, 3]]


def fail_on_rank_one(rank: int) -> None:
    if rank == 1:
        raise UserError("only here")
    torch.distributed.barrier()


def test_a_failing_rank_is_named_and_ends_the_others() -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1 failed.*UserError: only here"):
        run_distributed(fail_on_rank_one, 2)


def test_bfloat16(models: Path) -> None:
    foundation = load_foundation(models / "deepseek_v3", FoundationConfig(dtype="bfloat16"), 1, 0, "cpu")
    reference = load_file(models / "deepseek_v3.reference")
    own = AutoModelForCausalLM.from_pretrained(models / "deepseek_v3", dtype=torch.bfloat16)
    layer = foundation.layers[0]
    router = layer.module.router
    assert router.gate.weight.dtype == own.get_submodule(layer.name).gate.weight.dtype  # transformers 5.24 keeps float32
    others = {parameter.dtype for parameter in foundation.model.parameters() if parameter is not router.gate.weight}
    assert others == {torch.bfloat16}
    assert torch.equal(layer.w13, reference[f"{layer.name}.experts.gate_up_proj"].bfloat16())
    bias = router.e_score_correction_bias
    assert bias.dtype == torch.float32 and torch.equal(bias, reference[f"{layer.name}.gate.e_score_correction_bias"])


def test_finalize_output_matches_the_layer(models: Path) -> None:
    for family in ("qwen2_moe", "deepseek_v3", "olmoe"):
        layer = load_foundation(models / family, FoundationConfig(), 1, 0, "cpu").layers[0]
        hidden_BSD = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(0))
        x_TD = hidden_BSD.reshape(-1, HIDDEN)
        with torch.no_grad():
            scores_TK, experts_TK, _ = layer.module.router(x_TD, None)
            routed_TD = torch.zeros_like(x_TD)
            for expert in range(EXPERTS):
                gate_TF, up_TF = (x_TD @ layer.w13[expert].T).chunk(2, dim=1)
                out_TD = (torch.nn.functional.silu(gate_TF) * up_TF) @ layer.w2[expert].T
                routed_TD += out_TD * (scores_TK * (experts_TK == expert)).sum(1, keepdim=True)
            shared = autoep.shared_output(layer.module, x_TD, hidden_BSD)
            output = autoep.finalize_output(layer.module, routed_TD.view_as(hidden_BSD), shared)
            assert torch.allclose(output, layer.module(hidden_BSD), atol=TOLERANCE)


def test_hosting_a_materialised_model(models: Path) -> None:
    reference = load_file(models / "olmoe.reference")
    model = AutoModelForCausalLM.from_pretrained(models / "olmoe")
    layers = autoep.host_experts(model, 1, 0)
    assert [layer.index for layer in layers] == [0, 1]
    assert torch.equal(layers[1].w13, reference["model.layers.1.mlp.experts.gate_up_proj"])
    with torch.no_grad():
        assert torch.allclose(model(inputs()).logits, reference["logits"], atol=TOLERANCE)


def test_the_number_of_a_layer_is_behind_its_list(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever numbers stand in the path before it, for experts as for attention projections."""
    inner: Any = AutoModelForCausalLM.from_pretrained(models / "olmoe")

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config, self.model = inner.config, torch.nn.ModuleList([torch.nn.Identity(), inner.model])

    monkeypatch.setitem(FAMILY_TABLE["olmoe"].settings or {}, "moe_layer_pattern", r"model\.1\.layers\.\d+\.mlp")
    wrapped = Wrapped()
    hosted = autoep.host_experts(wrapped, 1, 0)
    assert [(layer.name, layer.index) for layer in hosted] == [("model.1.layers.0.mlp", 0), ("model.1.layers.1.mlp", 1)]
    assert [projection.layer for projection in find_projections(wrapped, AdapterConfig(attention=["q_proj"]))] == [0, 1]


def load(folder: Path, ep_size: int = 1) -> Foundation:
    return load_foundation(folder, FoundationConfig(), ep_size, 0, "cpu")


@pytest.fixture
def damaged(models: Path, tmp_path: Path) -> Path:
    """A copy of a good model, to be damaged."""
    return Path(shutil.copytree(models / "olmoe", tmp_path / "model"))


def test_other_family_is_refused(tmp_path: Path) -> None:
    save_model(GPT2Config(vocab_size=VOCAB, n_embd=HIDDEN, n_layer=1, n_head=2), tmp_path)
    known = (
        r"model_type 'gpt2' is neither a known mixture.*one of the families .*mixtral.*, or one of the dense families llama, "
    )
    with pytest.raises(UserError, match=rf"^foundation.path: {tmp_path}: {known}"):
        load(tmp_path)


def test_indivisible_ep_size_is_refused(models: Path) -> None:
    with pytest.raises(UserError, match=r"topology.ep_size: 3: 8 experts cannot be split evenly; choose one of 1, 2, 4, 8"):
        load(models / "olmoe", ep_size=3)


def test_other_activation_is_refused(damaged: Path) -> None:
    edit_config(damaged, hidden_act="gelu")
    with pytest.raises(UserError, match=r"config\.json: hidden_act: gelu: experts cannot compute it; .* one of silu, swish"):
        load(damaged)


def test_quantised_model_is_refused(damaged: Path) -> None:
    edit_config(damaged, quantization_config={"quant_method": "fp8"})
    with pytest.raises(UserError, match="the weights are quantised"):
        load(damaged)


def test_missing_tensor_is_named(damaged: Path) -> None:
    file = damaged / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(weights, file)
    with pytest.raises(UserError, match=r"model\.safetensors: no tensor 'model\.layers\.1\.mlp\.experts\.3\.up_proj"):
        load(damaged)


def test_surplus_tensor_is_named(damaged: Path) -> None:
    file = damaged / "model.safetensors"
    save_file({**load_file(file), "model.layers.0.mlp.gate.bias": torch.ones(EXPERTS)}, file)
    with pytest.raises(UserError, match=r"'model.layers.0.mlp.gate.bias' has no place in a 'olmoe' model"):
        load(damaged)


def test_wrong_shape_is_named(damaged: Path) -> None:
    edit_config(damaged, intermediate_size=FFN * 2)
    with pytest.raises(UserError, match=r"has shape \(16, 32\), config.json implies \(32, 32\)"):
        load(damaged)


def test_truncated_weights_are_refused(damaged: Path) -> None:
    file = damaged / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(UserError, match="damaged weight file"):
        load(damaged)


def test_missing_shard_is_named(models: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models / "deepseek_v3", tmp_path / "model"))
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name}: missing weight file"):
        load(folder)


def test_missing_tokenizer_is_refused(damaged: Path) -> None:
    for file in damaged.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="holds no tokenizer"):
        load(damaged)


def test_fingerprint_follows_the_weights(models: Path, damaged: Path) -> None:
    before = load(damaged).fingerprint
    assert before == load(models / "olmoe").fingerprint
    file = damaged / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, file)
    assert load(damaged).fingerprint != before


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (FoundationConfig(path="/no/such/model"), "foundation.path: /no/such/model: no such folder"),
        (FoundationConfig(path="./typo"), r"foundation.path: \./typo: no such folder"),
        (FoundationConfig(path="not a hub id"), "foundation.path: not a hub id: neither a folder nor a hub model"),
        (
            FoundationConfig(preset="tiny-olmo"),
            "foundation.preset: tiny-olmo: unknown preset; did you mean 'tiny-olmoe'",
        ),
        (FoundationConfig(preset=None), "foundation: neither path nor preset is set"),
    ],
)
def test_unusable_choice_is_one_line(config: FoundationConfig, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        resolve_foundation(config, 0, lambda line: None)
    assert "\n" not in str(caught.value)


def test_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no config.json"):
        resolve_foundation(FoundationConfig(path=str(tmp_path)), 0, lambda line: None)


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
