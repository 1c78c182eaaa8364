"""The `adapters:` section: what a client trains, and the forms of adapter experts."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from fedmoe_ds.config.section import Section


class MoEAdapterConfig(Section):
    """Adapter experts beside every feed-forward block of a dense foundation (FFT-MoE)."""

    experts: int = Field(8, ge=1, description="M, experts per block; divisible by ep_size")
    width: int = Field(16, ge=1, description="bottleneck width of an expert")
    top_k: int = Field(4, ge=1, description="most active experts per token: the largest budget")
    linear: bool = Field(False, description="experts without an activation: y = V U x, LoRA of rank `width`")
    shared: int = Field(0, ge=0, description="further experts that every token uses, with weight 1")
    zero: int = Field(
        0, ge=0, description="further experts to which tokens may be routed and which add nothing: their slots cost nothing"
    )
    router_input: Literal["token", "sample"] = Field(
        "token", description="sample: one decision per sample and layer, by its mean token and its score; images alone"
    )
    gate: Literal["softmax", "straight-through"] = Field(
        "softmax",
        description="what a row's experts weigh; softmax: over those that it uses, where one alone weighs 1 and teaches the "
        "router nothing; straight-through: p / stopgrad(p), which is 1 and has a gradient; needs top_k 1",
    )

    @model_validator(mode="after")
    def _check_gate(self) -> MoEAdapterConfig:
        if self.gate == "straight-through" and self.top_k > 1:
            raise ValueError(
                f"adapters.moe.gate: straight-through: weighs one expert per row, and adapters.moe.top_k is {self.top_k}; use "
                "top_k=1, or softmax"
            )
        return self


class AdapterConfig(Section):
    """What a client trains: LoRA on experts, attention or a dense feed-forward block, router, head, whole adapter experts."""

    rank: int = Field(8, ge=1, description="LoRA rank R")
    alpha: float = Field(16.0, gt=0, description="LoRA alpha; the update is scaled by alpha / rank")
    experts: bool = Field(
        True, description="train every expert's gate_up and down projection; where a dense foundation has none, false is meant"
    )
    expert_training: Literal["lora", "full"] = Field("lora", description="LoRA on the experts, or their whole weights")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="LoRA dropout on the input of adapters of projections, in steps of 1/65536; not on experts"
    )
    attention: list[str] = Field(
        ["q_proj", "v_proj"], description="attention projections with LoRA; [] for none, which is the default with `moe`"
    )
    feed_forward: list[str] = Field(
        default_factory=list,
        description="feed-forward projections of a dense foundation with LoRA: gate_proj, up_proj, down_proj (ViT: fc1, fc2)",
    )
    router: Literal["frozen", "train"] = Field("frozen", description="whether clients train the router weights")
    head: Literal["frozen", "train"] = Field(
        "frozen",
        description="whether clients train the whole head: the classifier of images (weights and bias), or the output matrix "
        "of a language model, a copy for every client in flight",
    )
    head_start: Literal["foundation", "zero"] = Field("foundation", description="what a trained head begins as")
    moe: MoEAdapterConfig | None = Field(
        None, description="adapter experts beside a dense foundation; null on one: plain LoRA on the projections above"
    )
    start: str | None = Field(
        None,
        min_length=1,
        description="what the global adapters begin as: a run, a checkpoint of one, or a folder with a LoRA of PEFT's "
        "(docs/results.md); null: A drawn, B zero",
    )

    @property
    def projections(self) -> list[str]:
        """All projections with LoRA, by name."""
        return [*self.attention, *self.feed_forward]

    @model_validator(mode="before")
    @classmethod
    def _adapter_experts_take_the_place_of_lora(cls, given: Any) -> Any:
        """FFT-MoE trains experts and router "in place of LoRA": attention gets some only where it is asked for."""
        if isinstance(given, dict) and given.get("moe") is not None:
            # Before validation: afterwards nobody could tell a default from the same value given by the user.
            return {"attention": [], **given}
        return given

    @model_validator(mode="after")
    def _check_expert_training(self) -> AdapterConfig:
        if self.moe is not None and not self.experts:
            # A key that could have no effect is refused: silence would let a user believe in it.
            raise ValueError("adapters.experts: false: adapters.moe adds experts, and they are trained; use true, or drop moe")
        if self.expert_training == "full" and (self.moe is not None or not self.experts):
            why = "adapter experts are always trained whole" if self.moe is not None else "adapters.experts is false"
            raise ValueError(f"adapters.expert_training: full: {why}; drop the key")
        if self.head_start == "zero" and self.head == "frozen":
            raise ValueError("adapters.head_start: zero: a frozen head stays the foundation's; drop the key, or use head=train")
        return self
