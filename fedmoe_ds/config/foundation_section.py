"""The `foundation:` section: the frozen model, and how a built-in one is pre-trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from fedmoe_ds.config.section import Section


class PretrainConfig(Section):
    """How the built-in foundation is pre-trained on the spot (ignored with `foundation.path` and smollm2-135m)."""

    steps: int = Field(450, ge=0, description="optimizer steps; 0 keeps the random initialisation")
    batch_size: int = Field(8, ge=1, description="sequences per step")
    lr: float = Field(3e-3, gt=0, description="peak AdamW learning rate, cosine to zero")
    threads: int = Field(1, ge=1, description="CPU threads; part of the cache key, because it is part of the bits")


class ConvertConfig(Section):
    """A dense foundation whose feed-forward blocks become experts made of their channels."""

    kind: Literal["channel-groups", "read-me"] = Field(
        "channel-groups",
        description="channel-groups: every row goes to all groups that its client may use, with weight one; read-me: channels "
        "that serve every token, and an expert for each domain of the pre-training text, chosen before the layers (llama)",
    )
    experts: int = Field(
        8, ge=1, description="E, equal groups of every block, as many as divide its width; or domains, which packages play"
    )
    order: Literal["saliency", "given"] = Field(
        "saliency", description="saliency: the largest sums of magnitudes come first; given: channels stay as they lie"
    )
    permanent: float = Field(0.3, gt=0, lt=1, description="read-me: share of a block's channels that serve every token")
    kept: float = Field(0.5, gt=0, le=1, description="read-me: share that a token meets, its expert's channels and these")
    batches: int = Field(16, ge=1, description="read-me: of 8 sequences per domain, whose activations say which channels")
    router_width: int = Field(32, ge=2, multiple_of=2, description="read-me: width of the router before the layers")
    router_layers: int = Field(1, ge=1, description="read-me: its layers")
    router_steps: int = Field(100, ge=0, description="read-me: of it, on the pre-training text, before any federation")
    router_lr: float = Field(3e-3, gt=0, description="read-me: AdamW learning rate of these steps, which falls to zero")

    @model_validator(mode="after")
    def _check_keys_of_the_kind(self) -> ConvertConfig:
        own = {"channel-groups": ("order",), "read-me": tuple(name for name in type(self).model_fields if name not in _COMMON)}
        for kind, names in own.items():
            for name in names if kind != self.kind else ():
                # Compared with the default and not with what was written: a run saves all keys.
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(
                        f"foundation.convert.{name}: {getattr(self, name)}: has no effect with kind {self.kind}; drop the key"
                    )
        return self


_COMMON = ("kind", "experts", "order")


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
    convert: ConvertConfig | None = Field(
        None, description="make experts of a dense foundation's feed-forward blocks; null: leave them as they are"
    )
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

    @model_validator(mode="after")
    def _check_expanded(self) -> FoundationConfig:
        if self.convert is not None and self.expand is not None:
            raise ValueError(
                "foundation.expand: further layers are copies of dense ones, and foundation.convert leaves none; drop one"
            )
        return self
