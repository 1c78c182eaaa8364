"""Families: how the sparse models that can be hosted route, as transformers' own layers do it.

AutoEP reads routing from any attribute of a configuration that has the right name, read by the family's layer or not: a
Mixtral with `routed_scaling_factor` in its config.json would be scaled there and nowhere else. So what a layer honours is said
here, family by family, and AutoEP is told. A family that AutoEP lists and this table does not is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedmoe_ds.errors import UserError
from fedmoe_ds.foundation.dense import DECODERS


@dataclass(frozen=True)
class Family:
    """One model type's routing.

    Attributes:
        score_func: what turns router logits into scores.
        normalised: whether the chosen weights are scaled to sum to one; a string is the configuration's attribute that says so.
        scaled: whether `routed_scaling_factor` multiplies them.
        grouped: whether experts are chosen within `topk_group` of `n_group` groups; a string is the value of `topk_method` that
            asks for it.
        methods: values of `topk_method` that the layer knows; None where it does not read it.
        settings: what else AutoEP has to be told.
        packs: whether tokens meet in attention alone, through transformers' interface: then samples can be packed.
    """

    score_func: str = "softmax"
    normalised: bool | str = True
    scaled: bool = False
    grouped: bool | str = False
    methods: tuple[str, ...] | None = None
    settings: dict[str, Any] | None = None
    packs: bool = True


FAMILIES: dict[str, Family] = {
    "deepseek_v2": Family(
        normalised=False, scaled=True, grouped="group_limited_greedy", methods=("greedy", "group_limited_greedy")
    ),
    "deepseek_v3": Family("sigmoid", normalised="norm_topk_prob", scaled=True, grouped=True),
    # Its attention chooses blocks of keys by an index of its own, over what it takes for one sequence.
    "minimax_m3_vl_text": Family("sigmoid", scaled=True, packs=False),
    "mixtral": Family(),
    # AutoEP has no preset for OLMoE. Its block has Mixtral's shape; whether top-k weights are normalised is in its config.
    "olmoe": Family(
        normalised="norm_topk_prob",
        settings={
            "moe_layer_pattern": r"model\.layers\.\d+\.mlp",
            "router_pattern": "gate",
            "expert_pattern": "experts",
            "expert_w1": "gate_up_proj",
            "expert_w2": "down_proj",
            "expert_w3": None,
            "num_experts_attr": "num_experts",
            "top_k_attr": "num_experts_per_tok",
            "score_apply": "post",
        },
    ),
    "qwen2_moe": Family(normalised="norm_topk_prob"),
    # As Mixtral, its router always normalises, and reads no attribute that could say otherwise. Many of its layers are
    # recurrent over the sequence.
    "qwen3_5_moe_text": Family(packs=False),
    "qwen3_moe": Family(normalised="norm_topk_prob"),
}


ACTIVATIONS = {"silu": None, "swish": None, "gelu_pytorch_tanh": "geglu_tanh", "gelu_new": "geglu_tanh"}
"""Values of `hidden_act` and AutoEP's names for gated units with them; None is what its preset says."""


def family_settings(config: Any) -> dict[str, Any]:
    """AutoEP's settings for a model of one of the `FAMILIES`, from its transformers configuration.

    Raises:
        UserError: the configuration asks for a way of choosing experts that the family's layer does not know, or for an
            activation that experts cannot compute here.
    """
    family = FAMILIES[config.model_type]
    where = f"foundation.path: {config._name_or_path or 'model'}: config.json:"
    if family.methods is not None and config.topk_method not in family.methods:
        raise UserError(
            f"{where} topk_method: {config.topk_method}: a '{config.model_type}' model has no such way to choose experts; "
            f"use one of {', '.join(family.methods)}"
        )
    if config.num_experts_per_tok < 1:
        raise UserError(f"{where} num_experts_per_tok: {config.num_experts_per_tok}: expected at least 1; get the file again")
    if config.hidden_act not in ACTIVATIONS:
        raise UserError(
            f"{where} hidden_act: {config.hidden_act}: experts cannot compute it; give a model with one of "
            f"{', '.join(ACTIVATIONS)}"
        )
    normalised, activation = family.normalised, ACTIVATIONS[config.hidden_act]
    return {
        **(family.settings or {}),
        "score_func": family.score_func,
        "route_norm": bool(getattr(config, normalised)) if isinstance(normalised, str) else normalised,
        "routed_scaling_factor": float(config.routed_scaling_factor) if family.scaled else 1.0,
        **({} if activation is None else {"expert_activation": activation}),
    }


def packs(model_type: str) -> bool:
    """Whether the samples of a pass can be packed in a model of this type, sparse or dense."""
    return FAMILIES[model_type].packs if model_type in FAMILIES else model_type in DECODERS


def routes_in_groups(config: Any) -> bool:
    """Whether a model's experts are chosen within groups of experts."""
    grouped = FAMILIES[config.model_type].grouped
    return config.topk_method == grouped if isinstance(grouped, str) else grouped
