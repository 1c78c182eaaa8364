"""Adapter configuration: `adapter_config.json`, as PEFT writes it and as vLLM and SGLang read it.

Read strictly: whatever a file sets that would change what the adapter computes, and that our adapters do not have, is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedmoe_ds.errors import UserError
from fedmoe_ds.storage.strict_json import read_json

CONFIG = "adapter_config.json"
FUSED_GATE_UP = ".*\\.gate_up_proj"
"""The pattern under which PEFT keeps the doubled rank of experts whose gate and up it has joined."""

# What says how an adapter was trained or made, not what it computes; `target_*` are compared with the tensors.
_SAID = {
    *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version", "task_type", "peft_type"),
    *("r", "lora_alpha", "lora_dropout", "target_modules", "target_parameters", "exclude_modules", "rank_pattern"),
    *("alpha_pattern", "layers_to_transform", "layers_pattern", "megatron_core", "megatron_config", "loftq_config"),
    *("eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config", "init_lora_weights"),
    "ensure_weight_tying",
}
_LARGEST_ALPHA = 1e9
_INITIAL = (True, False, None, "gaussian", "orthogonal", "eva", "mntp")
"""Initial values that leave the base model as it is; `pissa`, `olora`, `corda`, `loftq` and others change its weights."""


@dataclass(frozen=True)
class LoRAConfig:
    """What of an adapter's configuration decides what it computes: W + (alpha / rank) B A.

    Attributes:
        gate_up_factor: 2 where PEFT has joined gate and up of experts: their rank and alpha are twice those of the others.
        parameters: `target_parameters`, empty without any.
    """

    rank: int
    alpha: float
    base_model: str | None = None
    gate_up_factor: int = 1
    parameters: list[str] = field(default_factory=list)


def config_tree(
    targets: dict[str, list[str]], rank: int, alpha: float, base_model: str | None, task_type: str | None
) -> dict[str, Any]:
    """The content of `adapter_config.json` for an adapter that is written here."""
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "r": rank,
        # Its type is int where it can be: vLLM declares one.
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
        **targets,
    }


def read_config(folder: Path, where: str) -> LoRAConfig:
    """The configuration in a folder. Raises UserError, which begins with `where`, for what we cannot continue."""
    path = folder / CONFIG
    try:
        tree = read_json(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{where}: {path}: cannot be read: {reason}; give a folder that PEFT has saved") from None
    where = f"{where}: {path}"
    if not isinstance(tree, dict) or tree.get("peft_type") != "LORA":
        kind = tree.get("peft_type") if isinstance(tree, dict) else tree
        raise UserError(f"{where}: peft_type: {kind}: only LORA can be read; give a LoRA adapter")
    for key, value in sorted(tree.items()):
        _check(key, value, where)
    rank, alpha = tree.get("r"), tree.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise UserError(f"{where}: r: {rank}: expected a whole number of at least 1; get the file again")
    # Compared, not converted: an integer may have more digits than a float holds. NaN is below nothing.
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < _LARGEST_ALPHA:
        raise UserError(f"{where}: lora_alpha: {alpha}: expected a number above 0; get the file again")
    base, parameters = tree.get("base_model_name_or_path"), tree.get("target_parameters") or []
    if not isinstance(parameters, list) or not all(isinstance(name, str) for name in parameters):
        raise UserError(f"{where}: target_parameters: {parameters}: expected a list of names; get the file again")
    return LoRAConfig(rank, float(alpha), base if isinstance(base, str) else None, _factor(tree, where), parameters)


def _check(key: str, value: Any, where: str) -> None:
    """Refuse what changes the adapter's function in a way that ours has not."""
    if key == "init_lora_weights":
        if value not in _INITIAL:
            raise UserError(
                f"{where}: init_lora_weights: {value}: it has changed the base model's weights; save the adapter with PEFT's "
                "path_initial_model_for_weight_conversion first"
            )
    elif key == "bias":
        if value not in ("none", None):
            raise UserError(f"{where}: bias: {value}: biases are not trained here; give an adapter with bias none")
    elif key not in _SAID and value not in (None, False, 0) and value != [] and value != {}:
        raise UserError(
            f"{where}: {key}: {value}: changes what the adapter computes in a way that is not known here; give plain LoRA"
        )


def _factor(tree: dict[str, Any], where: str) -> int:
    """How many times the common rank gate and up of experts have together."""
    ranks, alphas = tree.get("rank_pattern") or {}, tree.get("alpha_pattern") or {}
    if not ranks and not alphas:
        return 1
    # The one pattern that PEFT writes by itself: both are doubled, so the scale is that of all others.
    if ranks == {FUSED_GATE_UP: 2 * tree["r"]} and alphas == {FUSED_GATE_UP: 2 * tree["lora_alpha"]}:
        return 2
    key, value = ("rank_pattern", ranks) if ranks else ("alpha_pattern", alphas)
    raise UserError(f"{where}: {key}: {value}: a run has one rank and one alpha; give an adapter without patterns")
