"""Batch job: what is asked of a batch system for a run, checked as the job itself would be.

Nobody trains here: a login node has neither the GPUs nor the time to read the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedmoe_ds.config import Config, load_config
from fedmoe_ds.errors import UserError
from fedmoe_ds.planner.allocation import (
    CORES_PER_GPU,
    LEAD_S,
    Gpus,
    asked_gpus,
    check_gpus,
    check_lead,
    check_room,
    hardware_of,
    lead_s,
    memory_mib,
)
from fedmoe_ds.planner.dry_run import checked
from fedmoe_ds.planner.memory import format_bytes
from fedmoe_ds.planner.world import World


@dataclass(frozen=True)
class Request:
    """What to run and on what.

    Attributes:
        gpus_per_node: means one task per GPU; `gpu_type` is the site's name for them.
        cpus_per_task, mem: None: as many cores and as much memory (of a node) as the configuration needs.
        cpus_per_gpu: in place of `cpus_per_task`, where a site counts cores so.
        hardware: a machine that the planner knows, or a calibration: what the job must fit into.
        sbatch: further options: `key=value` or `key`.
    """

    config: Path
    overrides: Sequence[str] = ()
    nodes: int = 1
    tasks_per_node: int | None = None
    gpus_per_node: int | None = None
    gpu_type: str | None = None
    cpus_per_task: int | None = None
    cpus_per_gpu: int | None = None
    mem: str | None = None
    hardware: str | None = None
    partition: str | None = None
    time: str | None = None
    account: str | None = None
    sbatch: Sequence[str] = ()

    @property
    def tasks(self) -> int:
        """Ranks per node."""
        return self.gpus_per_node or self.tasks_per_node or 1

    @property
    def ranks(self) -> int:
        return self.nodes * self.tasks

    @property
    def gpus(self) -> list[Gpus]:
        """All GPUs that are asked for, for nodes or for tasks: sbatch has several options for it."""
        own = f"gpus-per-node={':'.join(filter(None, (self.gpu_type, str(self.gpus_per_node))))}"
        return asked_gpus([*([own] if self.gpus_per_node is not None else []), *self.sbatch])


@dataclass(frozen=True)
class Checked:
    """A request that a job would not be refused for.

    Attributes:
        cores: of a rank. `mem`: of a node, in MiB. `lead`: seconds between the signal and the time limit.
        notes: lines for the user: what was found, and what was taken for granted.
    """

    config: Config
    cores: int = 1
    mem: int = 1024
    lead: int = LEAD_S
    notes: Sequence[str] = ()


def check(request: Request, environment: Mapping[str, str] | None = None) -> Checked:
    """Check a request as the job itself would, without reading or encoding data.

    Args:
        environment: of sbatch, which passes it on to the job.
    Raises:
        UserError: for everything that the job would be refused for on so many ranks, but for what only the data's rows show; it
            does not fit into its GPUs, or its time limit is too short for its waves.
    """
    for flag in ("nodes", "tasks_per_node", "gpus_per_node", "cpus_per_task", "cpus_per_gpu"):
        count = getattr(request, flag)
        if count is not None and count < 1:
            raise UserError(f"--{flag.replace('_', '-')}: {count}: is no number of them; give at least 1")
    config = load_config(request.config, request.overrides)
    kind = _kind(config, request, environment or {})
    if kind == "cuda":
        check_gpus(request.gpus, request.nodes, request.tasks)
    # Heavy: it builds the model, without weights. The login node has neither the GPUs nor the time for the data.
    job, world = checked(config, request.ranks, kind, counted=False), World(request.nodes, request.tasks)
    hardware, notes = hardware_of(request.hardware, request.gpus), [job.data.assumed or ""]
    cores, mem = CORES_PER_GPU if kind == "cuda" else config.execution.threads, memory_mib(job, kind, world)
    if hardware is None:
        what = "whether it fits into its GPUs, and " if kind == "cuda" else ""
        notes.append(f"not known: {what}how long a wave takes; --hardware says it (`fedmoe plan --help`)")
        return Checked(config, cores, mem, notes=notes)
    if hardware.kind != kind:
        raise UserError(f"--hardware: {hardware.name}: is {hardware.kind}, and the job's ranks are on {kind}; name another one")
    needed, lead = check_room(job, world, hardware), lead_s(job, world, hardware)
    check_lead(lead, request.time)
    notes.append(
        f"{format_bytes(needed)} per rank on {hardware.name}, which has {format_bytes(hardware.available(request.tasks))}; "
        f"signal {lead} s before the limit"
    )
    return Checked(config, cores, mem, lead, notes)


def _kind(config: Config, request: Request, environment: Mapping[str, str]) -> str:
    """The devices of the job's ranks: where it runs there are the GPUs that it asks for, whatever is here."""
    device, asked = config.topology.device, bool(request.gpus)
    accelerator = environment.get("DS_ACCELERATOR") or None
    if device == "cuda" and not asked:
        raise UserError("topology.device: cuda: the job asks for no GPU; add --gpus-per-node, or use auto or cpu")
    if device == "cpu" and asked:
        raise UserError(f"topology.device: cpu: the job asks for GPUs ({request.gpus[0].option}); ask for none, or use auto")
    # DeepSpeed goes by it in the job, too, where nobody has set it on purpose.
    if accelerator in ("cpu", "cuda") and (accelerator == "cuda") != asked:
        asks = "asks for GPUs" if asked else "asks for no GPU"
        raise UserError(f"DS_ACCELERATOR: {accelerator}: sbatch passes it on to the job, which {asks}; unset it")
    if request.cpus_per_gpu is not None and not asked:
        raise UserError(f"--cpus-per-gpu: {request.cpus_per_gpu}: the job asks for no GPU; use --cpus-per-task")
    return "cuda" if asked else "cpu"
