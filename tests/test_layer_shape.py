"""Every family that can be hosted tells how wide its layers are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_foundation import FAMILIES

from fedmoe_ds.foundation.meta_model import build_on_meta, host_model
from fedmoe_ds.foundation.size import model_size


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_of_families(tmp_path: Path, family: str) -> None:
    config = FAMILIES[family][0]()
    config.save_pretrained(tmp_path)
    model = build_on_meta(tmp_path, torch.float32)
    layers = host_model(model, 1, 0)
    size = model_size(model, layers)
    assert size.depth == config.num_hidden_layers >= size.layers == len(layers)
    assert size.layer.norms == 2 and size.layer.gated and size.tied == config.tie_word_embeddings
    assert (size.layer.feed_forward > 0) == (size.depth > size.layers)
    # Whether there are shared experts is what the model's parameters say.
    shared = any("shared_expert" in name and "down_proj" in name for name, _ in model.named_parameters())
    assert (size.layer.shared > 0) == shared
    attention = size.layer.attention
    assert attention.causal and attention.heads == config.num_attention_heads
    assert (attention.key_width != attention.value_width) == family.startswith("deepseek")
