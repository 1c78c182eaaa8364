"""Module names: what other tools call the layers that our adapters stand on, one table over all families.

Two naming schemes meet in a LoRA file. Keys of single experts have the names of the published weight files (Mixtral calls its
projections w1, w2 and w3), because vLLM and SGLang load experts under these, and PEFT converts them. All other keys have the
names of the model that transformers 5 builds. Sources: transformers' `conversion_mapping.py`, PEFT's
`utils/transformers_weight_conversion.py`, vLLM's `lora/layers/fused_moe`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from fedmoe_ds.errors import UserError
from fedmoe_ds.foundation.dense import DECODERS, VIT
from fedmoe_ds.foundation.tensor_names import present_name


@dataclass(frozen=True)
class ModuleNames:
    """One family's names.

    Attributes:
        layers: path to the list of decoder layers.
        attention: the attention module of a layer.
        elsewhere: attention projections that are in another module.
        block, gate, up, down: the mixture and its projections in keys of single experts.
        converted: whether PEFT (0.21) takes keys of single experts; for other families it adapts other modules without a word.
        served: whether vLLM and SGLang serve the family as a language model.
    """

    layers: str = "model.layers"
    attention: str = "self_attn"
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    converted: bool = True
    served: bool = True

    def projection(self, layer: int, part: str, name: str) -> str:
        """Path of a projection; `part` is `attention` or `feed_forward`."""
        module = self.elsewhere.get(name, self.attention) if part == "attention" else "mlp"
        return f"{self.layers}.{layer}.{module}.{name}"

    def expert(self, layer: int, expert: int, name: str) -> str:
        """Path of one expert's projection."""
        return f"{self.layers}.{layer}.{self.block}.experts.{expert}.{name}"

    def fused_experts(self, layer: int) -> str:
        """Path of the module that holds all experts of a layer as two parameters."""
        return f"{self.layers}.{layer}.mlp.experts"


_RECURRENT = dict.fromkeys(("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"), "linear_attn")

# A family that can be hosted and is not here (minimax_m3_vl_text) is refused: nobody has loaded an adapter of it elsewhere.
NAMES: dict[str, ModuleNames] = {
    **dict.fromkeys(DECODERS, ModuleNames()),
    VIT: ModuleNames("vit.layers", "attention", served=False),
    "deepseek_v2": ModuleNames(),
    "deepseek_v3": ModuleNames(),
    "mixtral": ModuleNames(block="block_sparse_moe", gate="w1", up="w3", down="w2"),
    "olmoe": ModuleNames(),
    "qwen2_moe": ModuleNames(converted=False),
    "qwen3_5_moe_text": ModuleNames(elsewhere=_RECURRENT, converted=False, served=False),
    "qwen3_moe": ModuleNames(),
}


def names_of(model_type: str, where: str) -> ModuleNames:
    """The names of a family.

    Args:
        where: what a refusal begins with, for instance `--format: peft`.
    Raises:
        UserError: the family is not in the table.
    """
    if model_type not in NAMES:
        raise UserError(
            f"{where}: the foundation is a '{model_type}' model, and what other tools call its layers is not known here; use "
            f"--format merged, or a foundation of {', '.join(sorted(NAMES))}"
        )
    return NAMES[model_type]


@dataclass(frozen=True)
class Place:
    """Where a tensor of a LoRA file belongs: `target` names a pair as our blocks do, `experts.gate_up` or `attention.q_proj`.

    Attributes:
        expert: of a key of one expert, else None; `branch` is then `gate`, `up` or `down`.
        fused: whether the tensor holds all experts of a layer.
    """

    layer: int
    target: str
    expert: int | None = None
    branch: str = ""
    fused: bool = False


# Any prefix: models inside others (`language_model`) have one more.
_EXPERT = re.compile(r"(?:.*\.)?layers\.(\d{1,6})\.mlp\.experts\.(\d{1,6})\.(gate|up|down)_proj")
_FUSED = re.compile(r"(?:.*\.)?layers\.(\d{1,6})\.mlp\.experts(\.base_layer)?")
_PROJECTION = re.compile(r"(?:.*\.)?layers\.(\d{1,6})\.(?:(\w*att\w*)|mlp)\.(\w+)")
_TARGETS = {"gate": "experts.gate_up", "up": "experts.gate_up", "down": "experts.down"}


def place_of(path: str) -> Place | None:
    """Where a module of another tool's file belongs, in names of transformers 4 or 5; None: we have no such adapter."""
    # As of a weight: present_name knows what files of all ages call a module.
    path = present_name(f"{path}.weight").removesuffix(".weight")
    if found := _EXPERT.fullmatch(path):
        return Place(int(found[1]), _TARGETS[found[3]], int(found[2]), found[3])
    if found := _FUSED.fullmatch(path):
        # PEFT wraps parameters in the order of the module: gate_up_proj inside, down_proj around it.
        return Place(int(found[1]), "experts.gate_up" if found[2] else "experts.down", fused=True)
    if found := _PROJECTION.fullmatch(path):
        return Place(int(found[1]), f"{'attention' if found[2] else 'feed_forward'}.{found[3]}")
    return None
