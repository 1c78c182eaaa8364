"""Schema: the one typed configuration tree of a run, all keys with their defaults.

Every section is a frozen pydantic model that refuses unknown keys and wrong types; cross-field rules that need no model and
no data are checked here, the others where the needed fact becomes known (top_k against the foundation, clients against data).
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fedmoe_ds.config.adapters_section import AdapterConfig
from fedmoe_ds.config.data_section import DataConfig
from fedmoe_ds.config.devices_section import DevicesConfig
from fedmoe_ds.config.evaluation_section import CheckpointConfig, EvaluationConfig, problem_of_best
from fedmoe_ds.config.foundation_section import FoundationConfig
from fedmoe_ds.config.local_section import LocalConfig, problem_of_drift
from fedmoe_ds.config.privacy_section import PrivacyConfig
from fedmoe_ds.config.section import Section
from fedmoe_ds.config.server_section import ServerConfig


class TopologyConfig(Section):
    """world = clusters x ep_size."""

    ep_size: int = Field(1, ge=1, description="ranks that share one expert pool")
    clusters: int | None = Field(None, ge=1, description="if given, checked against world / ep_size")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: cuda where there is a GPU and $DS_ACCELERATOR does not say cpu; on cuda a GPU for each rank"
    )
    control: Literal["auto", "torch", "mpi"] = Field(
        "auto", description="what carries host-side messages; auto: MPI where mpirun started the ranks, else torch (gloo)"
    )
    aggregation: Literal["torch", "mpi"] = Field("torch", description="what carries the sums of a round")
    interface: str | None = Field(
        None, min_length=1, description="interface of gloo and NCCL on every host (ib0, hsn0); default: a fabric of all hosts"
    )
    # Long enough for a slow cluster's waves: the others wait for it in the aggregation.
    timeout_s: float = Field(1800.0, gt=0, description="longest wait in one collective, seconds; then the job ends")
    # Apart from timeout_s: a dead host is noticed within a minute, however long a wait may be.
    silence_s: float = Field(60.0, ge=2, description="a rank that gives no sign of life for so long ends the job")


class TierConfig(Section):
    """One budget tier: the FLOPs of `top_k` active experts per token, and the share or names of the clients under it.

    FLAME spends the budget on top_k itself. Methods that spend it on the LoRA rank, on the number of experts that a batch may
    train or a client holds or has as models of their own, or on the number of layers, take the fraction top_k / K of theirs,
    unless the tier says another number. Without experts (plain LoRA on a dense foundation) K is 1, and tiers differ by rank or
    by layers.
    """

    top_k: int | None = Field(None, ge=1, description="default: K, the model's own; without experts 1")
    share: float | None = Field(None, gt=0, description="share of the clients; needed unless they are named")
    clients: list[str] | None = Field(
        None, min_length=1, description="the tier's clients by name; then every tier names its own, and none has a share"
    )
    rank: int | None = Field(None, ge=1, description="LoRA rank of methods that spend the budget on it; default R * top_k / K")
    experts: int | None = Field(
        None,
        ge=1,
        description="experts trained (HFedMoE: per batch; Flux), held per layer (FedMoE, FLEX-MoE), base models trained and "
        "averaged (Split-Mix, SHEFL); default E * top_k / K",
    )
    layers: int | None = Field(None, ge=1, description="layers trained, the last ones (EmbracingFL); default N * top_k / K")
    blocks: int | None = Field(
        None, ge=1, description="layers of foundation.expand that are trained (FedBE); default G * top_k / K"
    )


class FederationConfig(Section):
    """Rounds, participants and budget tiers."""

    rounds: int = Field(3, ge=1)
    participation: float = Field(1.0, gt=0, le=1, description="fraction of clients drawn each round, at least one")
    sampling: Literal["uniform", "size", "budget"] = Field(
        "uniform",
        description="draw clients with equal chances, in proportion to their samples, or to their top_k; weights in the mean "
        "stay, so with `size` samples count twice: in the draw and in the mean",
    )
    # null and not a list: the default follows from the foundation's own top_k.
    tiers: list[TierConfig] | None = Field(
        None, description="default: top_k = K, K/2, ..., 1 with equal shares; without experts one tier"
    )
    budget: Literal["method", "top_k", "rank", "both"] = Field(
        "method", description="what a tier's budget buys; method: what its paper says"
    )
    assignment: Literal["shuffled", "in_order"] = Field("shuffled", description="how clients are dealt to tiers by share")
    tier_column: str | None = Field(
        None, description="column of the data that holds each client's tier, as outputs call it (4, or 4 r2); natural partition"
    )


class MethodConfig(BaseModel):
    """`name` picks the method; the other keys are its own parameters, checked by the method itself."""

    # Parameters of methods live with the methods, so that a new method needs no change here.
    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    name: str = "flame"


class ExecutionConfig(Section):
    """How the same mathematics is run."""

    reproducible: Literal["auto", "bitwise", "fast"] = Field(
        "auto", description="auto: bitwise on CPU, fast on CUDA, where bitwise is refused: its products promise no bits"
    )
    clients_in_flight: int | None = Field(8, ge=1, description="clients trained at once per cluster; null: all")
    micro_batch_size: int | None = Field(
        None,
        ge=1,
        description="sequences per client in one pass; null: whole step; with packing, as many tokens as full ones have",
    )
    packing: bool = Field(
        False, description="lay the samples of a pass end to end, without padding; each attends to itself alone"
    )
    moments_on: Literal["device", "host"] = Field(
        "device", description="where a GPU's clients have their optimizer state; host: fetched for each step; refused on CPUs"
    )
    threads: int = Field(1, ge=1, description="CPU threads per rank; bitwise mode needs 1")
    activation_checkpointing: bool = False
    client_state_gib: float = Field(
        4.0,
        ge=0,
        allow_inf_nan=False,
        description="GiB of what clients keep for themselves (personal adapters, control or dual variables) in a rank's "
        "memory; more lies in mapped files without a name below foundation.cache",
    )
    owned_gib: float = Field(
        4.0,
        gt=0,
        allow_inf_nan=False,
        description="most GiB that a client in flight may hold of whole layers (foundation.expand): values, gradients, moments",
    )
    adapter_kernels: Literal["auto", "torch", "triton"] = Field(
        "auto",
        description="low-rank products; auto: own C++ on CPU; on CUDA Triton's kernels where Triton is installed, else torch's "
        "grouped products. Triton's are checked in its interpreter and compiled for sm_80, sm_90 and sm_100, never timed",
    )
    expert_halves: bool = Field(
        False,
        description="with topology.ep_size above 1, rows travel in two halves, by experts: products of one are computed while "
        "the other travels; changes no bit. For large passes of GPUs on several hosts: fedmoe plan says what it is worth",
    )


class Config(Section):
    """A whole run."""

    name: str = Field("run", min_length=1, description="the run lives in <output>/<name>")
    output: str = Field("runs", description="folder of all runs; on a file system that all ranks share")
    seed: int = Field(0, ge=0, description="every random draw is addressed by it")
    foundation: FoundationConfig = FoundationConfig()
    adapters: AdapterConfig = AdapterConfig()
    topology: TopologyConfig = TopologyConfig()
    federation: FederationConfig = FederationConfig()
    local: LocalConfig = LocalConfig()
    method: MethodConfig = MethodConfig()
    server: ServerConfig = ServerConfig()
    data: DataConfig = DataConfig()
    devices: DevicesConfig = DevicesConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    execution: ExecutionConfig = ExecutionConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    deepspeed: dict[str, Any] = Field(default_factory=dict, description="passed to DeepSpeed where it makes sense")

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str) -> str:
        # No separator and no leading dot: the name must not lead out of `output` or hide the run.
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError(f"{name}: a run's name is a folder; use letters, digits, '.', '_' and '-'")
        return name

    @model_validator(mode="before")
    @classmethod
    def _further_layers_take_the_place_of_lora(cls, given: Any) -> Any:
        """As adapter experts do: attention gets LoRA only where it is asked for, which is refused below."""
        if not isinstance(given, dict) or not isinstance(given.get("foundation"), dict):
            return given
        adapters = given.get("adapters", {})
        if given["foundation"].get("expand") is None or not isinstance(adapters, dict):
            return given
        return {**given, "adapters": {"attention": [], **adapters}}

    @model_validator(mode="after")
    def _check_expansion(self) -> Config:
        adapters = self.adapters
        given = {name: getattr(adapters, name) for name in ("moe", "attention", "feed_forward")}
        given |= {"head": adapters.head == "train"}
        key = next((name for name, value in given.items() if value), None)
        if self.foundation.expand is not None and key is not None:
            raise ValueError(
                f"adapters.{key}: foundation.expand trains its layers alone, all others stay as they are; drop one of the two"
            )
        return self

    @model_validator(mode="after")
    def _check_trainables(self) -> Config:
        adapters = self.adapters
        if self.foundation.expand is not None:
            return self
        frozen = adapters.router == "frozen" and adapters.head == "frozen"
        if not adapters.experts and not adapters.projections and frozen:
            raise ValueError(
                "adapters: nothing would be trained; set experts=true, name projections in attention or feed_forward, or use "
                "router=train or head=train"
            )
        # Of a hosted mixture top_k is compared with the model, which is not known yet.
        if adapters.moe is not None and adapters.moe.top_k > adapters.moe.experts:
            raise ValueError(
                f"adapters.moe.top_k: {adapters.moe.top_k}: more than the {adapters.moe.experts} experts; use at most these"
            )
        return self

    @model_validator(mode="after")
    def _check_drift(self) -> Config:
        if (problem := problem_of_drift(self.local)) is not None:
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _check_public(self) -> Config:
        public, training = self.data.public, self.server.training
        if training is not None and public == 0:
            raise ValueError("server.training: trains on the public split, and data.public is 0; give it a share, or drop it")
        if training is None and public > 0:
            raise ValueError(
                f"data.public: {public}: only the server would have these samples, and it does not train; add server.training "
                "({epochs: 0} to leave them aside), or drop the key"
            )
        return self

    @model_validator(mode="after")
    def _check_best(self) -> Config:
        if (problem := problem_of_best(self.checkpoint, self.evaluation)) is not None:
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _check_moments(self) -> Config:
        # bfloat16 would change nothing there: the key belongs to the run's identity and must not lie.
        if self.local.moments == "bfloat16" and self.local.optimizer == "sgd" and self.local.momentum == 0:
            raise ValueError(
                "local.moments: bfloat16: sgd without momentum keeps no moments; use local.momentum above 0, "
                "local.optimizer=adamw, or local.moments=float32"
            )
        return self
