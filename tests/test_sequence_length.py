"""The longest sequence of a foundation: families, scaled rotary embeddings, sliding windows; refused before loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    ViTConfig,
)

from fedmoe_ds.config.schema import Config
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation.run_spec import check_plan
from fedmoe_ds.federation.sequence_checks import check_length, check_rotations
from fedmoe_ds.foundation.builtin.presets import PRESETS
from fedmoe_ds.foundation.context_length import longest_sequence

N = 64
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": N}
LLAMA3 = {**YARN, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FAMILIES = [OlmoeConfig, MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig, DeepseekV2Config, DeepseekV3Config, LlamaConfig]
CASES: list[tuple[Any, int | None]] = [
    *((family(max_position_embeddings=N), N) for family in FAMILIES),
    (GPT2Config(n_positions=N), N),
    (MixtralConfig(max_position_embeddings=N, sliding_window=16), N),
    (Qwen2MoeConfig(max_position_embeddings=N, use_sliding_window=True, sliding_window=16), N),
    (LlamaConfig(max_position_embeddings=N, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}), 2 * N),
    (LlamaConfig(max_position_embeddings=N, rope_scaling={"type": "dynamic", "factor": 3.0}), 3 * N),
    (Qwen3MoeConfig(max_position_embeddings=N, rope_scaling=YARN), 4 * N),  # Qwen's: the stated length is the original one
    (DeepseekV3Config(max_position_embeddings=4 * N, rope_scaling=YARN), 4 * N),  # DeepSeek's: stretched already
    (LlamaConfig(max_position_embeddings=16 * N, rope_scaling=LLAMA3), 16 * N),  # Llama 3.1's: further than the factor
    (ViTConfig(), None),
    (None, None),
]


@pytest.mark.parametrize(("model", "longest"), CASES)
def test_the_longest_sequence_is_taken_and_one_more_is_refused(model: Any, longest: int | None) -> None:
    assert longest_sequence(model) == longest

    def config(length: int) -> Config:
        return Config.model_validate({"data": {"sequence_length": length}})

    check_length(config(longest or 10**6), model)
    if longest is not None:
        with pytest.raises(UserError, match=rf"^data\.sequence_length: {longest + 1}: .* has {longest} positions; use at most"):
            check_length(config(longest + 1), model)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotations_that_depend_on_neighbours_are_refused_in_bitwise_mode(kind: str) -> None:
    scaling: dict[str, Any] = {"rope_type": kind, "factor": 3.0, "rope_theta": 1e4, "original_max_position_embeddings": N}
    factors = {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16} if kind == "longrope" else {}
    model = LlamaConfig(max_position_embeddings=N, num_attention_heads=4, hidden_size=128, rope_parameters=scaling | factors)
    at, beyond = (Config.model_validate({"data": {"sequence_length": length}}) for length in (N, N + 8))
    check_rotations(at, model, bitwise=True)
    check_rotations(beyond, model, bitwise=False)
    check_rotations(beyond, LlamaConfig(max_position_embeddings=N, rope_parameters=YARN | {"rope_theta": 1e4}), bitwise=True)
    with pytest.raises(UserError, match=rf"^data\.sequence_length: {N + 8}: beyond {N} positions .*reproducible=fast"):
        check_rotations(beyond, model, bitwise=True)


@pytest.mark.parametrize("preset", [name for name, preset in PRESETS.items() if preset.task == "causal_lm"])
def test_a_preset_refuses_before_anything_is_trained(preset: str, tmp_path: Path) -> None:
    longest = PRESETS[preset].config().max_position_embeddings
    tree: dict[str, Any] = {"foundation": {"preset": preset}, "data": {"sequence_length": longest + 1}}
    if PRESETS[preset].family != "olmoe":
        tree["adapters"] = {"moe": {}}
    with pytest.raises(UserError, match=rf"^data\.sequence_length: {longest + 1}: .*{preset}\) has {longest} positions"):
        check_plan(Config.model_validate(tree), bitwise=True)


def test_a_model_folder_refuses_before_it_is_loaded(tmp_path: Path) -> None:
    OlmoeConfig(max_position_embeddings=N).save_pretrained(tmp_path)  # and no weights
    config = Config.model_validate({"foundation": {"path": str(tmp_path)}, "data": {"sequence_length": N + 1}})
    with pytest.raises(UserError, match=rf"^data\.sequence_length: 65: .*{tmp_path.name}\) has 64 positions; use at most 64"):
        check_plan(config, bitwise=True)
