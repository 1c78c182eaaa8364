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


class ConvertConfig(Section):
    """What a dense llama is made into before a run: experts that are groups of the channels of its feed-forward blocks."""

    kind: Literal["read-me"] = Field(
        "read-me", description="channels that serve all domains of its pre-training text, and an expert for each domain"
    )
    experts: int = Field(8, ge=2, description="domains, each of which has an expert; packages of the standard library play them")
    permanent: float = Field(0.3, gt=0, lt=1, description="share of a block's channels that serve every token")
    kept: float = Field(0.5, gt=0, le=1, description="share of the channels that a token meets: these, and its expert's")
    batches: int = Field(16, ge=1, description="batches of 8 sequences per domain, by whose activations channels are chosen")
    router_width: int = Field(32, ge=2, multiple_of=2, description="width of the router that decides before the layers")
    router_layers: int = Field(1, ge=1, description="its layers")
    router_steps: int = Field(100, ge=0, description="steps that it is trained on the pre-training text; 0: it stays as drawn")
    router_lr: float = Field(3e-3, gt=0, description="AdamW learning rate of these steps")


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
    convert: ConvertConfig | None = Field(None, description="make experts of a dense llama's channels; null: as it is")
    trust_remote_code: bool = Field(
        False, description="run the Python code of a tokenizer in the model folder, which may do anything; no model's ever runs"
    )
    mapped: Literal["shared", "all"] = Field(
        "shared",
        description="on CPUs, weights that lie in mapped files of the cache folder: what several ranks of a host hold alike, "
        "or all; then the disk holds the model once more, and a later start copies nothing",
    )
    cache: str | None = Field(None, description="cache folder; default $FEDMOE_CACHE or ~/.cache/fedmoe_ds")
