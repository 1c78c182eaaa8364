"""Families: whatever a configuration asks for, logits are Hugging Face's within 1e-5, or the model is refused by name.

The list of sparse families is AutoEP's own, so a preset that a newer DeepSpeed adds makes these tests fail until it is handled.
Every configuration key is tried that some family's layers read: a family that does not read it has to go on ignoring it.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_foundation_dense as dense
import torch
from deepspeed.module_inject.auto_ep_presets.registry import PRESET_MODELS
from deepspeed.moe.ep_experts import EXPERT_ACTIVATIONS, ExpertActivation
from test_foundation import FAMILIES, TOLERANCE, VOCAB, edit_config, save_model
from test_logits import Hosted
from transformers import AutoModelForCausalLM

from fedmoe_ds.config import FoundationConfig
from fedmoe_ds.data.tokenizer import train_tokenizer
from fedmoe_ds.errors import UserError
from fedmoe_ds.foundation import autoep, families, load_foundation
from fedmoe_ds.kernels.frozen_layers import replace_frozen
from fedmoe_ds.model.batch import Rows

MODEL_TYPES = {name: config().model_type for name, (config, _) in FAMILIES.items()}

# Values that change no shape: written into config.json, where any family may carry them.
KEYS: dict[str, dict[str, Any]] = {
    "not normalised": {"norm_topk_prob": False},
    "normalised": {"norm_topk_prob": True},
    "scaled": {"routed_scaling_factor": 3.0},
    "grouped": {"n_group": 2, "topk_group": 1},
    "softmax": {"scoring_func": "softmax"},
    "sigmoid": {"scoring_func": "sigmoid"},
    "jitter": {"router_jitter_noise": 0.1},
    "tanh GELU": {"hidden_act": "gelu_pytorch_tanh"},
    "eps": {"rms_norm_eps": 0.2},
    "sliding window": {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1},
    "clipped": {"clip_qkv": 0.5},
}
SHAPES: dict[str, dict[str, Any]] = {
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
}
# Opposite to what families without these keys do, all at once.
CROWDED = {**KEYS["scaled"], **KEYS["grouped"], **KEYS["tanh GELU"], **KEYS["eps"], **KEYS["clipped"]}
TOGETHER = {
    "crowded, softmax": {**CROWDED, "scoring_func": "softmax", "norm_topk_prob": True},
    "crowded, sigmoid": {**CROWDED, "scoring_func": "sigmoid", "norm_topk_prob": False},
}

DENSE_KEYS: dict[str, dict[str, Any]] = {
    "crowded": {
        "hidden_act": "gelu",
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "sliding_window": 4,
        "use_sliding_window": True,
        "max_window_layers": 1,
        "clip_qkv": 0.5,
        "rms_norm_eps": 0.2,
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 100.0, "original_max_position_embeddings": 16},
    },
    "biases": {"attention_bias": True, "mlp_bias": True},
    "narrow heads": {"head_dim": 12},
    "tied": {"tie_word_embeddings": True},
    "tanh GELU": {"hidden_act": "gelu_pytorch_tanh"},
    "window": {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1},
    "linear RoPE": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0}},
    "dynamic RoPE": {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}},
}
IMAGE_KEYS: dict[str, dict[str, Any]] = {
    "crowded": {"hidden_act": "relu", "qkv_bias": False, "layer_norm_eps": 0.2, "patch_size": 3, "image_size": [12, 12]},
}


@contextmanager
def original_rotary() -> Iterator[None]:
    """Hugging Face's own functions, while other tests of this process have put ours in their place."""
    homes = [module for name, module in sys.modules.items() if name.startswith("transformers.models.")]
    ours = {
        home: home.apply_rotary_pos_emb for home in homes if hasattr(vars(home).get("apply_rotary_pos_emb"), "batch_invariant")
    }
    for home, function in ours.items():
        home.apply_rotary_pos_emb = function.__wrapped__
    yield
    for home, function in ours.items():
        home.apply_rotary_pos_emb = function


def tokens() -> np.ndarray:
    return np.random.default_rng(1).integers(2, VOCAB, size=20)


def write(folder: Path, family: str, shapes: dict[str, Any], keys: dict[str, Any]) -> Path:
    """A model folder of a family whose configuration also says this."""
    config = FAMILIES[family][0]()
    config.update({key: value for key, value in shapes.items() if key == "tie_word_embeddings" or hasattr(config, key)})
    save_model(config, folder / family)
    train_tokenizer(["import this"], VOCAB).save_pretrained(folder / family)
    edit_config(folder / family, **keys)
    return folder / family


def check(folder: Path) -> None:
    """Our pass over one client's sequence, padded and beside another client's, against Hugging Face's over it alone."""
    with original_rotary(), torch.no_grad():
        theirs_SV = AutoModelForCausalLM.from_pretrained(folder).eval()(torch.from_numpy(tokens())[None]).logits[0]
    hosted = Hosted(folder, 1, 0, merge=True)
    hosted.execution.rescaler = False
    rows = [Rows(slot, hosted.foundation.top_k, [ids], [ids > 0]) for slot, ids in enumerate((tokens(), tokens()[::-1][:7]))]
    with torch.no_grad():
        ours_BSV, _, _ = hosted.logits(rows, None)
    largest = float(theirs_SV.abs().max())
    assert largest > 0.3
    difference = float((ours_BSV[0] - theirs_SV).abs().max())
    assert difference <= TOLERANCE * max(1.0, largest), (difference, largest)


def test_every_preset_of_autoep_is_handled() -> None:
    """A new one fails here: add it to `foundation.families` and to the models of these tests."""
    listed = {model_type for preset in PRESET_MODELS.values() for model_type in preset.hf_model_types}
    assert listed <= set(families.FAMILIES), "AutoEP hosts families whose routing is not in the table"
    assert set(families.FAMILIES) == set(MODEL_TYPES.values()), "every known family is among the models of these tests"


@pytest.mark.parametrize("keys", TOGETHER)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sparse_model_with_everything_in_its_configuration(family: str, keys: str, tmp_path: Path) -> None:
    check(write(tmp_path, family, {**SHAPES["biases"], **SHAPES["tied"]}, TOGETHER[keys]))


@pytest.mark.sweep
@pytest.mark.parametrize("case", [*KEYS, *SHAPES])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sparse_model_key_by_key(family: str, case: str, tmp_path: Path) -> None:
    check(write(tmp_path, family, SHAPES.get(case, {}), KEYS.get(case, {})))


def test_sparse_attention_of_minimax(tmp_path: Path) -> None:
    config = FAMILIES["minimax_m3"][0]()
    config.layer_types = ["full_attention", "minimax_m3_sparse"]
    config.index_n_heads, config.index_head_dim, config.index_block_size, config.index_topk_blocks = 2, 8, 4, 2
    save_model(config, tmp_path / "minimax_m3")
    train_tokenizer(["import this"], VOCAB).save_pretrained(tmp_path / "minimax_m3")
    check(tmp_path / "minimax_m3")


REFUSED = {
    "exact GELU": ("mixtral", {"hidden_act": "gelu"}, r"config\.json: hidden_act: gelu: experts cannot compute it; give a"),
    "clamped": ("qwen3_moe", {"swiglu_limit": 1.0}, r"model_type 'qwen3_moe' cannot be hosted .* clamp their SwiGLU"),
    "no such method": ("deepseek_v2", {"topk_method": "noaux_tc"}, r"topk_method: noaux_tc: .* use one of greedy, group_lim"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_computed_is_refused_by_name(case: str, tmp_path: Path) -> None:
    family, keys, message = REFUSED[case]
    folder = write(tmp_path, family, {}, keys)
    with pytest.raises(UserError, match=message) as caught:
        load_foundation(folder, FoundationConfig(), 1, 0, "cpu")
    assert str(folder) in str(caught.value)


def test_what_another_deepspeed_may_bring_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A preset that nobody compared, a unit that nobody knows, a known name for something else, weights before the experts."""
    folder = write(tmp_path, "minimax_m3", {}, {})

    def refusal() -> str:
        with pytest.raises(UserError, match=r"model_type 'minimax_m3_vl_text'") as caught:
            load_foundation(folder, FoundationConfig(), 1, 0, "cpu")
        return str(caught.value)

    with monkeypatch.context() as patch:
        patch.delitem(families.FAMILIES, "minimax_m3_vl_text")
        assert "was never compared" in refusal()
    with monkeypatch.context() as patch:
        other = ExpertActivation(lambda gate, up, alpha, limit: gate * up, uses_alpha=True, uses_limit=True)
        patch.setitem(EXPERT_ACTIVATIONS, "swiglu_oai", other)
        assert "its experts compute 'swiglu_oai', which is not known here" in refusal()
    with monkeypatch.context() as patch:
        patch.setattr(autoep, "gated_unit", lambda *unit: None)
        assert "its experts compute 'swiglu_oai', which is not known here" in refusal()
    with monkeypatch.context() as patch:
        patch.setattr("deepspeed.module_inject.auto_ep_layer.resolve_score_apply_mode", lambda spec, override: "pre")
        assert "its routing weights apply before the experts (score_apply 'pre')" in refusal()


def dense_cases() -> Iterator[Any]:
    for family, key in itertools.product(dense.FAMILIES, {**DENSE_KEYS, **IMAGE_KEYS}):
        known = IMAGE_KEYS if family == "vit" else DENSE_KEYS
        if key in known and family != "vit-new-names":
            marks = () if key == "crowded" else pytest.mark.sweep
            yield pytest.param(family, known[key], id=f"{family}, {key}", marks=marks)


@pytest.mark.parametrize(("family", "keys"), dense_cases())
def test_a_dense_model(family: str, keys: dict[str, Any], tmp_path: Path) -> None:
    """With the layers that training puts in the place of the frozen ones."""
    config = type(dense.FAMILIES[family][0]())(**{**(dense.IMAGES if family == "vit" else dense.TEXT), **keys})
    dense.save(config, tmp_path / family)
    foundation = dense.load(tmp_path / family)
    replace_frozen(foundation.model)
    model: Any = foundation.model
    with torch.no_grad():
        hidden_BSD = model.base_model(**dense.inputs(family)).last_hidden_state
        logits = model.classifier(hidden_BSD[:, 0]) if family == "vit" else model.get_output_embeddings()(hidden_BSD)
        with original_rotary():
            expected = dense.reference(tmp_path / family)(**dense.inputs(family)).logits
    assert expected.abs().max() > 0.3
    assert (logits - expected).abs().max() <= TOLERANCE
