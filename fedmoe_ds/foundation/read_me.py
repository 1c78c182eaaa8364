"""Read-ME's converter: a dense llama becomes a sparse model of the channels of its feed-forward blocks, once, in the cache.

    FFN_d(x) = down((m_permanent + m_d) act(x)),    d the expert of the token, the same in every layer

A permanent part and experts are slices of the dense matrices (`domain_channels.py`), with gates of one: with all channels kept
the model is the dense one. The folder holds a Qwen2-MoE, llama's attention with a shared expert. That expert's gate is
sigmoid(0) = 1/2, so its output projection is doubled, which rounds nothing; with one expert per token, whose weight is scaled
to one, gates of experts are one in transformers as well, but for its choice: a router before the layers (`pre_gate.py`) is in
no model of transformers, so it lies beside the model's tensors, with the dense input projections that its targets are read
from. CODE: VITA-Group/READ-ME. COMPLETION: the router is trained on the dense model's own channels before any federation, as a
turn of the code's, and its steps begin at a learning rate that falls to zero.

Legend: D domains (experts), N sequences, S positions, L layers, F channels, K of an expert, P permanent ones, M model width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, Qwen2MoeConfig

from fedmoe_ds.config.foundation_section import ConvertConfig
from fedmoe_ds.distributed.stop_points import stop_point
from fedmoe_ds.errors import UserError
from fedmoe_ds.foundation import conversion, file_sums
from fedmoe_ds.foundation.builtin.loop import isolated
from fedmoe_ds.foundation.domain_channels import DomainChannels, choose, width
from fedmoe_ds.foundation.domains import BATCH, activations, domain_texts, domains_told, mean_activations, sequences
from fedmoe_ds.foundation.loading import load_model
from fedmoe_ds.foundation.meta_model import CONFIG_FILE, read_config
from fedmoe_ds.foundation.pre_gate import NAME, PreGateShape, logits, overlaps, router_loss
from fedmoe_ds.foundation.weight_files import WEIGHTS_FILE
from fedmoe_ds.randomness import generator, torch_generator
from fedmoe_ds.storage import cache

_SAME = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "dtype",
]
"""What a Qwen2-MoE's configuration calls as a llama's does."""


def converted_config(dense: Any, convert: ConvertConfig) -> Any:
    """The transformers configuration of what a dense model is made into.

    Raises:
        UserError: the dense model is none that can be.
    """
    _check(dense, convert)
    channels = dense.intermediate_size
    permanent = width(convert.permanent, channels)
    return Qwen2MoeConfig(
        **{name: getattr(dense, name) for name in _SAME},
        moe_intermediate_size=width(convert.kept, channels) - permanent,
        shared_expert_intermediate_size=permanent,
        num_experts=convert.experts,
        num_experts_per_tok=1,
        norm_topk_prob=True,
        qkv_bias=False,
        architectures=["Qwen2MoeForCausalLM"],
        **{NAME: {"width": convert.router_width, "layers": convert.router_layers}},
    )


def convert_read_me(source: Path, convert: ConvertConfig, seed: int, root: Path, note: conversion.Note) -> Path:
    """Return the folder of the sparse model that the dense one in a folder becomes, made if the cache lacks it. Rank 0 only.

    Raises:
        UserError: the dense model is no llama that can be converted, or the cache cannot be written.
    """
    config = converted_config(read_config(source), convert)
    names, told = domains_told(convert.experts)
    files = sorted(path for path in source.iterdir() if path.suffix in (".safetensors", ".json", ".model") and path.is_file())
    place = cache.place(root, file_sums.KIND)
    sums = {path.name: file_sums.file_sum(path, place) for path in files}
    key = {"convert": convert.model_dump(), "source": sums, "text": told, "seed": seed}
    shared, own = config.shared_expert_intermediate_size, config.moe_intermediate_size
    said = (
        f"{convert.experts} experts of {own} channels each, {shared} of {config.intermediate_size} permanent, one expert per "
        f"token, by domains {', '.join(names)}"
    )

    def make(folder: Path) -> None:
        # One thread: what is made must not depend on the machine's number of cores.
        with isolated(1):
            _write(source, folder, config, convert, seed)

    return conversion.store(key, said, make, root, note)


def _check(dense: Any, convert: ConvertConfig) -> None:
    kind = "foundation.convert.kind: read-me"
    if dense.model_type != "llama" or dense.hidden_act != "silu" or dense.attention_bias or dense.mlp_bias:
        raise UserError(
            f"{kind}: a '{dense.model_type}' model: channels are known of a llama with SiLU and without biases alone; use one "
            "(tiny-llama), or drop foundation.convert"
        )
    permanent, kept = (width(share, dense.intermediate_size) for share in (convert.permanent, convert.kept))
    if not 0 < permanent < kept:
        raise UserError(
            f"foundation.convert.permanent: {convert.permanent}: {permanent} of the {kept} channels that are kept, which "
            "leaves no expert any, or nothing permanent; use a share between 0 and foundation.convert.kept"
        )
    if convert.router_width > dense.hidden_size:
        raise UserError(
            f"foundation.convert.router_width: {convert.router_width}: the router's embedding begins as columns of the "
            f"model's, which has {dense.hidden_size}; use at most these"
        )


def _write(source: Path, folder: Path, config: Any, convert: ConvertConfig, seed: int) -> None:
    model: Any = load_model(source, torch.float32, 1, 0, torch.device("cpu"))[0]
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    most = convert.batches * BATCH
    domains = [sequences(tokenizer, found, config.eos_token_id, most) for found in domain_texts(convert.experts).values()]
    means_DLF = torch.stack([mean_activations(model, domain_NS) for domain_NS in domains])
    chosen = choose(means_DLF, config.shared_expert_intermediate_size, config.moe_intermediate_size)
    masks_LDF = chosen.masks(config.intermediate_size)
    router = _train_router(model, config, convert, masks_LDF, torch.cat(domains), seed)
    tensors = {**_sparse(model, config, chosen), **{f"{NAME}.{name}": value for name, value in router.items()}}
    tensors[f"{NAME}.masks_LEF"] = masks_LDF
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, folder / WEIGHTS_FILE, {"format": "pt"})
    (folder / CONFIG_FILE).write_text(config.to_json_string(use_diff=False))
    tokenizer.save_pretrained(folder)


def _sparse(model: Any, config: Any, chosen: DomainChannels) -> dict[str, Tensor]:
    """The model's tensors by name, feed-forward blocks cut into experts, and the dense input projections."""
    tied = set(model.all_tied_weights_keys)
    tensors = {name: value for name, value in model.state_dict().items() if ".mlp." not in name and name not in tied}
    dense = []
    for place, layer in enumerate(model.base_model.layers):
        gate_FM, up_FM, down_MF = (getattr(layer.mlp, f"{name}_proj").weight for name in ("gate", "up", "down"))
        permanent_P, expert_DK = chosen.permanent_LP[place], chosen.expert_DLK[:, place]
        at = f"model.layers.{place}.mlp"
        tensors[f"{at}.experts.gate_up_proj"] = torch.cat([gate_FM[expert_DK], up_FM[expert_DK]], dim=1)
        tensors[f"{at}.experts.down_proj"] = down_MF.T[expert_DK].transpose(1, 2)
        tensors[f"{at}.shared_expert.gate_proj.weight"] = gate_FM[permanent_P]
        tensors[f"{at}.shared_expert.up_proj.weight"] = up_FM[permanent_P]
        tensors[f"{at}.shared_expert.down_proj.weight"] = 2.0 * down_MF[:, permanent_P]
        tensors[f"{at}.shared_expert_gate.weight"] = torch.zeros(1, config.hidden_size)
        tensors[f"{at}.gate.weight"] = torch.zeros(config.num_experts, config.hidden_size)
        dense.append(torch.cat([gate_FM, up_FM]))
    tensors[f"{NAME}.gate_up_LGD"] = torch.stack(dense)
    return tensors


def _train_router(
    model: Any, config: Any, convert: ConvertConfig, masks_LDF: Tensor, sequences_NS: Tensor, seed: int
) -> dict[str, Tensor]:
    """The router's weights after its steps; the dense model is what tokens' channels are read from."""
    shape = PreGateShape.of(config)
    assert shape is not None
    weights = {name: _drawn(seed, name, size) for name, size in shape.weights().items()}
    weights["embedding"] = model.get_input_embeddings().weight[:, : shape.width].clone()
    for value in weights.values():
        value.requires_grad_()
    optimizer = torch.optim.AdamW(weights.values(), lr=convert.router_lr, weight_decay=0.0)
    draws = generator(seed, "read-me-router")
    with activations(model) as found:
        for step in range(convert.router_steps):
            stop_point()
            optimizer.param_groups[0]["lr"] = convert.router_lr * (1.0 - step / convert.router_steps)
            batch_BS = sequences_NS[torch.from_numpy(draws.integers(len(sequences_NS), size=BATCH))]
            model.base_model(input_ids=batch_BS, use_cache=False)
            logits_TE = logits(weights, shape.layers, batch_BS).flatten(0, 1)
            targets = [overlaps(a.flatten(0, 1), mask_DF) for a, mask_DF in zip(found, masks_LDF, strict=True)]
            loss = torch.stack([router_loss(logits_TE, target_TE) for target_TE in targets]).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
    return {name: value.detach() for name, value in weights.items()}


def _drawn(seed: int, name: str, size: tuple[int, ...]) -> Tensor:
    bound = size[-1] ** -0.5
    return torch.empty(size).uniform_(-bound, bound, generator=torch_generator(seed, "read-me-router", name))
