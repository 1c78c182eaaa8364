"""The `foundation:` section: the frozen model, and how a built-in one is pre-trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedmoe_ds.config.section import Section


class PretrainConfig(Section):
    """How the built-in foundation is pre-trained on the spot (ignored with `foundation.path` and smollm2-135m)."""

    steps: int = Field(450, ge=0, description="optimizer steps; 0 keeps the random initialisation")
    batch_size: int = Field(8, ge=1, description="sequences per step")
    lr: float = Field(3e-3, gt=0, description="peak AdamW learning rate, cosine to zero")
    threads: int = Field(1, ge=1, description="CPU threads; part of the cache key, because it is part of the bits")


class ExpandConfig(Section):
    """Layers that a dense decoder gets beside its own, and that clients train whole (block expansion)."""

    blocks: int = Field(
        ..., ge=1, description="G, divides the layers: after each of G equal groups comes a copy of its last, zero at first"
    )


class FoundationConfig(Section):
    """The frozen model: a sparse mixture of experts, or a dense one, with or without adapter experts beside it."""

    preset: str | None = Field("tiny-olmoe", description="built-in foundation, or smollm2-135m (fetched); ignored with `path`")
    path: str | None = Field(None, description="Hugging Face model folder or hub id")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="storage type of the frozen weights; auto: float32 on CPU, on CUDA bfloat16 where the model's own is, "
        "else float32; what it meant is saved with the run",
    )
    pretrain: PretrainConfig = PretrainConfig()
    expand: ExpandConfig | None = Field(
        None, description="further layers, trained whole in the place of LoRA; dense Llama, Mistral, Qwen3 without biases"
    )
    trust_remote_code: bool = Field(
        False, description="run the Python code of a tokenizer in the model folder, which may do anything; no model's ever runs"
    )
    mapped: Literal["shared", "all"] = Field(
        "shared",
        description="on CPUs, weights that lie in mapped files of the cache folder: what several ranks of a host hold alike, "
        "or all; then the disk holds the model once more, and a later start copies nothing",
    )
    cache: str | None = Field(None, description="cache folder; default $FEDMOE_CACHE or ~/.cache/fedmoe_ds")
