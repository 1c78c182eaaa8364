"""Allocation: what a batch job asks for besides its nodes: GPUs for its ranks, cores, memory, and time to stop in.

Nothing is asked of SLURM here: all of it follows from the configuration, from options of sbatch, and from the planner.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from fedmoe_ds.errors import UserError
from fedmoe_ds.federation.schedule import largest_wave, schedule
from fedmoe_ds.planner.client_costs import ClientCosts
from fedmoe_ds.planner.hardware import Hardware, load_hardware, table_names
from fedmoe_ds.planner.memory import outlasting
from fedmoe_ds.planner.network import Network
from fedmoe_ds.planner.plan import check_memory
from fedmoe_ds.planner.prediction import predict_job
from fedmoe_ds.planner.rank_memory import ON_HOST, rank_memory
from fedmoe_ds.planner.training import WaveModel
from fedmoe_ds.planner.workload import Job
from fedmoe_ds.planner.world import World

CORES_PER_GPU = 4
"""Of a rank with a GPU: Python, the writer of checkpoints, the watchdog, and what reads files at the start."""
_GPU_HOST_BYTES = 6 * 2**30
"""Host memory of a rank with a GPU before it keeps anything: libraries, CUDA's context, pinned buffers; an assumption."""
_NODE_BYTES = 2 * 2**30
"""Of a node, for what rank 0 does alone: preparing data, pre-training a small foundation; an assumption."""
_SLACK = 1.25
"""Memory that is asked for over what is predicted: a job that exceeds it is killed."""
LEAD_S = 120
"""Seconds between signal and limit where nobody knows how long a wave takes, and the least at all."""
_SAVE_S = 60.0
"""For the checkpoint, and for signals to travel."""
_ASSUMED_FACTOR, _MEASURED_FACTOR = 2.0, 1.3
"""How much longer than predicted a wave may take, on hardware of the table and on hardware that was calibrated."""


@dataclass(frozen=True)
class Gpus:
    """GPUs that one option of sbatch asks for: how many for each `node`, `task`, `socket` or `job`, and of which type."""

    per: str
    count: int
    type: str | None
    option: str


def asked_gpus(options: Sequence[str]) -> list[Gpus]:
    """What options of sbatch ask for: `gpus-per-task=a100:2`, `gres=gpu:2,nvme:1`, `tres-per-task=cpu:4,gres/gpu=1`."""
    return [gpus for option in options for gpus in _gpus_of(option.removeprefix("--"))]


def _gpus_of(option: str) -> list[Gpus]:
    key, _, value = option.partition("=")
    if re.fullmatch(r"gpus(-per-[a-z]+)?", key):
        per = key.removeprefix("gpus").removeprefix("-per-") or "job"
        asked = [("gpu", *part.split(":")) for part in value.split(",")]
    elif re.fullmatch(r"gres|tres-per-[a-z]+", key):
        per = key.removeprefix("tres-per-") if key != "gres" else "node"
        asked = [tuple(re.split("[:=]", part.removeprefix("gres/").removeprefix("gres:"))) for part in value.split(",")]
    else:
        return []
    # name[:type][:count]; without a count it is one.
    found = [(part[1:], int(part[-1]) if part[-1].isdigit() else 1) for part in asked if part[0] == "gpu"]
    return [
        Gpus(per, count, next((word for word in words if word and not word.isdigit()), None), option)
        for words, count in found
        if count
    ]


def check_gpus(gpus: Sequence[Gpus], nodes: int, tasks: int) -> None:
    """Raise UserError where a node's tasks, or all of them, are more than the GPUs that they get: a rank needs one."""
    for asked in gpus:
        ranks, where = {"node": (tasks, "a node"), "job": (nodes * tasks, "the job")}.get(asked.per, (0, ""))
        # One option may name several types, of which each has its own number.
        count = sum(other.count for other in gpus if other.option == asked.option)
        if ranks > count:
            raise UserError(
                f"--tasks-per-node: {tasks}: {where} has {ranks} tasks and {count} GPUs ({asked.option}); give every "
                "task one (--gpus-per-node starts as many), or use topology.device=cpu"
            )


def hardware_of(name: str | None, gpus: Sequence[Gpus]) -> Hardware | None:
    """The machine that `--hardware` names, or that the type of the GPUs means; None where neither says it.

    Raises:
        UserError: no such hardware.
    """
    if name is not None:
        return load_hardware(name)
    for asked in gpus:
        words = re.split("[-_]", (asked.type or "").lower())
        sizes = [int(found[1]) for word in words if (found := re.search(r"(\d+)gb?$", word))]
        for known in table_names():
            hardware = load_hardware(known)
            # A type may name another memory than the table's, or a part of a GPU.
            if known in words and all(size == round(hardware.memory_bytes / 1e9) for size in sizes):
                return hardware
    return None


def check_room(job: Job, world: World, hardware: Hardware) -> int:
    """Bytes that a rank holds on such a machine. Raises UserError where it has fewer."""
    config = job.config
    ep_size, in_flight = config.topology.ep_size, config.execution.clients_in_flight
    found = predict_job(job, ep_size, in_flight, world, hardware)
    check_memory(job, found, world, hardware)
    return found.memory_total


def memory_mib(job: Job, kind: str, world: World) -> int:
    """Host memory of a node, for `--mem`: on the CPU all of every rank, beside a GPU what stays on the host; whole GiB."""
    config, drawn = job.config, len(job.participants(1))
    ep_size, in_flight, clusters = (
        config.topology.ep_size,
        config.execution.clients_in_flight,
        world.ranks // config.topology.ep_size,
    )
    if kind == "cpu":
        held = rank_memory(job, ep_size, in_flight, load_hardware("cpu"), drawn, clusters=clusters)
        each = float(sum(held.device.values()))
    else:
        # Weights are read through files that are mapped: pages that the system may take back are no reason to kill a job.
        lasting = outlasting(job, len(job.clients), drawn, clusters)
        each = _GPU_HOST_BYTES + sum(lasting.get(name, 0) for name in ON_HOST)
    return 1024 * math.ceil((each * _SLACK * world.ranks_per_host + _NODE_BYTES) / 2**30)


def lead_s(job: Job, world: World, hardware: Hardware) -> int:
    """Seconds before the limit at which ranks must be told to stop, so that the longest wave ends and they save."""
    config = job.config
    ep_size, in_flight, chosen = config.topology.ep_size, config.execution.clients_in_flight, job.participants(1)
    costs = ClientCosts.of(job, hardware, world.ranks_per_host, 1)
    plan = schedule(chosen, job.cost, config.local, world.ranks // ep_size, ep_size, in_flight)
    model = WaveModel(job, hardware, Network(hardware, world), ep_size, largest_wave(plan), costs)
    # A cluster of one wave takes as long as the wave.
    spent, _ = model.clusters([[wave] for waves in plan for wave in waves])
    longest = max((one.total for one in spent), default=0.0)
    factor = _MEASURED_FACTOR if hardware.measured else _ASSUMED_FACTOR
    # In whole tens: a prediction does not know single seconds.
    return max(LEAD_S, 10 * math.ceil((factor * longest + _SAVE_S) / 10))


def check_lead(lead: int, limit: str | None) -> None:
    """Raise UserError where the signal would come in the first half of the job: it would save more than it trains."""
    seconds = limit_s(limit)
    if seconds is not None and 2 * lead > seconds:
        raise UserError(
            f"--time: {limit}: the ranks need {lead} s of it to finish a wave and save, more than half; give at least "
            f"{math.ceil(2 * lead / 60)} minutes, or use fewer execution.clients_in_flight or local.steps"
        )


def limit_s(text: str | None) -> int | None:
    """Seconds of a time limit as sbatch takes it; None for none, and for what sbatch itself must judge.

    `minutes`, `minutes:seconds`, `hours:minutes:seconds`, `days-hours`, `days-hours:minutes`, `days-hours:minutes:seconds`.
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text or "")
    if found is None:
        return None
    days, *rest = found.groups()
    parts = [int(part) for part in rest if part is not None]
    # After days come hours; without them one number, or the first of two, is minutes.
    hours_first = days is not None or len(parts) == 3
    hours, minutes, seconds = [*parts, 0, 0][:3] if hours_first else [0, *parts, 0][:3]
    # sbatch takes zero for no limit.
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds or None
