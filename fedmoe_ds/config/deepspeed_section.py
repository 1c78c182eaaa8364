"""The `deepspeed:` section: monitors, loggers and profilers pass; what would mix clients is refused with the reason.

DeepSpeed is built to train one model on all ranks. Here the ranks of different clusters train different clients, so
every feature of it that averages, clips or shards "over the world" would leak one client into another.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from fedmoe_ds.config.problems import explained, first_of, shown
from fedmoe_ds.config.section import Section
from fedmoe_ds.errors import nearest


class TensorboardSection(Section):
    enabled: bool = False
    output_path: str = ""
    job_name: str = "DeepSpeedJobName"


class WandbSection(Section):
    enabled: bool = False
    group: str | None = None
    team: str | None = None
    project: str = "deepspeed"


class CsvMonitorSection(Section):
    enabled: bool = False
    output_path: str = ""
    job_name: str = "DeepSpeedJobName"


class CometSection(Section):
    enabled: bool = False
    samples_log_interval: int = Field(100, ge=1)
    project: str | None = None
    workspace: str | None = None
    experiment_name: str | None = None
    experiment_key: str | None = None
    online: bool | None = None
    mode: Literal["get", "create", "get_or_create"] | None = None


class CommsLoggerSection(Section):
    enabled: bool = False
    prof_all: bool = True
    prof_ops: list[str] = Field(default_factory=list)
    debug: bool = False


class FlopsProfilerSection(Section):
    enabled: bool = False
    profile_step: int = Field(1, ge=1)
    module_depth: int = Field(-1, ge=-1)
    top_modules: int = Field(1, ge=1)
    detailed: bool = True
    output_file: str | None = None


class ActivationCheckpointingSection(Section):
    synchronize_checkpoint_boundary: bool = False
    cpu_checkpointing: bool = False


class DeepSpeedSection(Section):
    """What may pass. Used to check only: the user's own dict is what DeepSpeed gets, so its defaults stay its own."""

    tensorboard: TensorboardSection = TensorboardSection()
    wandb: WandbSection = WandbSection()
    csv_monitor: CsvMonitorSection = CsvMonitorSection()
    comet: CometSection = CometSection()
    comms_logger: CommsLoggerSection = CommsLoggerSection()
    flops_profiler: FlopsProfilerSection = FlopsProfilerSection()
    activation_checkpointing: ActivationCheckpointingSection = ActivationCheckpointingSection()


# Our own tree holds the section as a plain dict; only here do its keys have types.
class _Root(BaseModel):
    """Puts the section at its place in the tree, so that messages carry the full dotted key."""

    deepspeed: DeepSpeedSection


ALLOWED: tuple[str, ...] = tuple(DeepSpeedSection.model_fields)

# By reason and not by key: the reference prints one row per reason.
_REASONS: dict[str, tuple[str, ...]] = {
    "its optimizer shards and gathers across the world, that is across clients; set foundation.dtype": (
        "bf16",
        "bfloat16",
        "fp16",
        "amp",
        "torch_autocast",
        "data_types",
    ),
    "a stage above 0 would partition state across clusters, that is across clients; use topology.ep_size": (
        "zero_optimization",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
    ),
    "would clip over all clients jointly; use local.clip": ("gradient_clipping",),
    "every client has its own optimizer and schedule; use local.optimizer, local.lr, local.schedule": (
        "optimizer",
        "scheduler",
    ),
    "the batch belongs to a client; use local.batch_size and execution.micro_batch_size": (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "managed_gradient_accumulation",
    ),
    "built from topology and foundation; use topology.ep_size": (
        "expert_parallel",
        "use_data_before_expert_parallelism",
        "tensor_parallel",
        "sequence_parallel_size",
        "pipeline",
    ),
    "belongs to averaging gradients over ranks, that is over clients, which local training never does; remove it": (
        "prescale_gradients",
        "gradient_predivide_factor",
        "gradient_allreduce_op",
        "communication_data_type",
        "seq_parallel_communication_data_type",
        "sparse_gradients",
        "disable_allgather",
    ),
    "rounds have their own checkpoints; use checkpoint.every and checkpoint.keep": ("checkpoint", "datastates_ckpt"),
    "batches are made per client; use data.* and local.*": (
        "dataloader_drop_last",
        "data_efficiency",
        "curriculum_learning",
    ),
    "DeepSpeed's engine would print it, and no engine trains clients; read the seconds of every phase in metrics.jsonl": (
        "wall_clock_breakdown",
        "steps_per_print",
        "timers",
    ),
    "belongs to DeepSpeed's engine, and no engine trains clients; remove it": (
        "aio",
        "autotuning",
        "compile",
        "compression_training",
        "disable_python_gc",
        "dump_state",
        "eigenvalue",
        "elasticity",
        "hybrid_engine",
        "log_level",
        "memory_breakdown",
        "progressive_layer_drop",
        "quantize_training",
        "sparse_attention",
        "weight_quantization",
    ),
}
REFUSED: dict[str, str] = {key: reason for reason, keys in _REASONS.items() for key in keys}
_SHARED = "shares a client's activations among ranks of one tensor-parallel group, and there is none; remove it"
_PRINTED = "prints through DeepSpeed's log, which is held back; "
REFUSED_INSIDE: dict[str, str] = {
    "comms_logger.verbose": f"{_PRINTED}read comms-rank<r>.csv in the run folder, and remove it",
    "flops_profiler.recompute_fwd_factor": "counts backward passes of DeepSpeed's engine, which trains no client; remove it",
    "activation_checkpointing.partition_activations": _SHARED,
    "activation_checkpointing.contiguous_memory_optimization": _SHARED,
    "activation_checkpointing.number_checkpoints": _SHARED,
    "activation_checkpointing.profile": f"{_PRINTED}use flops_profiler, or read the phases of every round in metrics.jsonl",
}
"""Keys of sections that pass."""
# The configuration is saved with the run and shown in its report, so no key of it may hold a secret.
_SECRET = "deepspeed.comet.api_key: a secret would be saved with the run; set the environment variable COMET_API_KEY"  # noqa: S105  (a message)


def deepspeed_problems(section: dict[str, Any]) -> list[str]:
    """Return one line per entry of the section that cannot pass, in the order of the section."""
    problems = []
    for key, value in section.items():
        # Refused before unknown: a key that DeepSpeed knows deserves its reason, not a spelling hint.
        if key in REFUSED:
            problems.append(f"deepspeed.{key}: {shown(value)}: {REFUSED[key]}")
        elif key not in ALLOWED:
            problems.append(f"deepspeed.{key}: unknown, or not passed on by this project{nearest(key, ALLOWED)}")
        elif key == "comet" and isinstance(value, dict) and "api_key" in value:
            problems.append(_SECRET)
        else:
            inside = {f"{key}.{name}": found for name, found in value.items()} if isinstance(value, dict) else {}
            refused = {name: found for name, found in inside.items() if name in REFUSED_INSIDE}
            problems += [f"deepspeed.{name}: {shown(found)}: {REFUSED_INSIDE[name]}" for name, found in refused.items()]
            # One line per mistake: the typed check would report a refused inner key as unknown once more.
            problems += [] if refused else _type_problems(key, value)
    return problems


def without_effect(section: dict[str, Any], checkpointing: bool) -> list[str]:
    """One line if the section says how to recompute layers where none is recomputed."""
    # The section says how to recompute; whether is for execution.activation_checkpointing to say.
    if "activation_checkpointing" not in section or checkpointing:
        return []
    return [
        "deepspeed.activation_checkpointing: nothing is recomputed; set execution.activation_checkpointing=true, or remove it"
    ]


def checked_deepspeed_section(section: dict[str, Any]) -> dict[str, Any]:
    """Return `section` unchanged, ready to be merged into DeepSpeed's own configuration.

    Raises UserError, one line, for a key that is unknown, mistyped or would mix clients.
    """
    problems = deepspeed_problems(section)
    if problems:
        raise first_of(problems)
    return section


def _type_problems(key: str, value: Any) -> list[str]:
    try:
        # The checked copy is dropped: it would pass our defaults on to DeepSpeed as if the user had set them.
        _Root.model_validate({"deepspeed": {key: value}})
    except ValidationError as error:
        return explained(error, _Root)
    return []
