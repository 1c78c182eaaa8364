"""Tensor names: what tensors are called in checkpoints, and in the model of transformers 5."""

from __future__ import annotations

import re

# Checkpoints from before transformers 5 store one tensor per expert, under family names; in the model they are fused.
_OLD_NAMES = (
    (re.compile(r"\.block_sparse_moe\."), ".mlp."),
    (re.compile(r"\.experts\.(\d+)\.w1\.weight$"), r".experts.\1.gate_proj.weight"),
    (re.compile(r"\.experts\.(\d+)\.w3\.weight$"), r".experts.\1.up_proj.weight"),
    (re.compile(r"\.experts\.(\d+)\.w2\.weight$"), r".experts.\1.down_proj.weight"),
    # ViT files still have the names from before transformers 5, and transformers goes on writing them.
    (re.compile(r"^vit\.encoder\.layer\."), "vit.layers."),
    (re.compile(r"^(vit\.layers\.\d+\.attention)\.attention\.query\."), r"\1.q_proj."),
    (re.compile(r"^(vit\.layers\.\d+\.attention)\.attention\.key\."), r"\1.k_proj."),
    (re.compile(r"^(vit\.layers\.\d+\.attention)\.attention\.value\."), r"\1.v_proj."),
    (re.compile(r"^(vit\.layers\.\d+\.attention)\.output\.dense\."), r"\1.o_proj."),
    (re.compile(r"^(vit\.layers\.\d+)\.intermediate\.dense\."), r"\1.mlp.fc1."),
    (re.compile(r"^(vit\.layers\.\d+)\.output\.dense\."), r"\1.mlp.fc2."),
)
# Some checkpoints carry what models compute, or a pooler that a ViT classifier reads nothing from.
UNUSED = re.compile(r"rotary_emb\.inv_freq$|^vit\.pooler\.")


def present_name(name: str) -> str:
    """The name that a stored tensor has today."""
    for pattern, replacement in _OLD_NAMES:
        name = pattern.sub(replacement, name)
    return name
