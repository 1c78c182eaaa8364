"""Federation: a whole run simulated: some of its rounds are drawn, scheduled and predicted, and stand for the others."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from fedmoe_ds.config import Config
from fedmoe_ds.distributed.open_files import WORK, files_of
from fedmoe_ds.distributed.topology import check_layout
from fedmoe_ds.federation.schedule import schedule, wave_slots
from fedmoe_ds.planner.evaluation import Evaluation, one_evaluation_seconds
from fedmoe_ds.planner.hardware import Hardware
from fedmoe_ds.planner.legality import check_world
from fedmoe_ds.planner.network import Network
from fedmoe_ds.planner.prediction import Prediction, predict_job
from fedmoe_ds.planner.workload import Job, resolve
from fedmoe_ds.planner.world import World
from fedmoe_ds.simulation.clients import peopled, placeholder
from fedmoe_ds.simulation.failures import Checkpointing, Failures
from fedmoe_ds.simulation.setting import Setting
from fedmoe_ds.simulation.storage import RECORD_S, Storage, with_columns

_NEVER, _REPEATS = 10**9, 5
SCORED = 10_000
"""Clients whose own hold-outs are predicted one by one; more cost in proportion."""


@dataclass(frozen=True)
class Simulated:
    """A federation on paper; seconds are the model's, to be read with the hardware's spread.

    Attributes:
        rounds: predictions of the sampled rounds, without evaluation.
        evaluation_s: of all evaluations of the run.
        drawing_s, scheduling_s: of one round on this machine, measured.
        open_files: of rank 0.
    """

    job: Job
    world: World
    hardware: Hardware
    setting: Setting
    drawn: int
    rounds: dict[int, Prediction]
    evaluation_s: float
    storage: Storage
    drawing_s: float
    scheduling_s: float
    open_files: int

    @cached_property
    def round_seconds(self) -> list[float]:
        """Of the sampled rounds."""
        return [prediction.round_seconds for prediction in self.rounds.values()]

    @property
    def mean_round(self) -> float:
        """Seconds of a round, its share of all evaluations included."""
        return float(np.mean(self.round_seconds)) + self.evaluation_s / self.total_rounds

    @property
    def total_rounds(self) -> int:
        return self.job.config.federation.rounds

    @property
    def seconds(self) -> float:
        """Of all rounds and evaluations, without checkpoints and failures."""
        return self.total_rounds * self.mean_round

    @property
    def first(self) -> Prediction:
        return next(iter(self.rounds.values()))

    @property
    def record_s(self) -> float:
        """Seconds in which rank 0 writes a round's figures."""
        return RECORD_S[0] + RECORD_S[1] * self.drawn

    @property
    def write_s(self) -> float:
        """Seconds until a checkpoint is on disk."""
        return self.storage.checkpoint / self.setting.storage_bytes_per_s

    @property
    def restart_s(self) -> float:
        """Seconds from a failure until training goes on."""
        return 60.0 * self.setting.restart_minutes + self.storage.start / self.setting.storage_bytes_per_s

    @property
    def failures(self) -> Failures:
        return Failures(self.setting.mtbf_hours * 3600.0 / self.world.hosts, self.restart_s)

    def checkpointing(self, factor: float = 1.0) -> Checkpointing:
        """Where rounds take `factor` times as long as predicted."""
        return Checkpointing(factor * self.mean_round, self.write_s, self.job.config.checkpoint.background)

    def run_seconds(self, factor: float = 1.0) -> float:
        """Expected seconds of the run with checkpoints as configured, and failures."""
        every = min(self.job.config.checkpoint.every, self.total_rounds)
        slowdown = self.checkpointing(factor).slowdown(self.failures, every)
        return float(factor * self.seconds * slowdown)

    @cached_property
    def _held(self) -> tuple[dict[str, int], dict[str, int]]:
        return with_columns(self.first, len(self.job.clients))

    @property
    def memory(self) -> dict[str, int]:
        """Bytes per rank by purpose, where it computes."""
        return self._held[0]

    @property
    def host_memory(self) -> dict[str, int]:
        """Bytes per rank by purpose on the host beside its device; empty where the host is what computes."""
        return self._held[1]

    @property
    def spilled(self) -> int:
        """Bytes per rank of clients' own state in mapped files."""
        return self.first.client_files

    @property
    def device_bytes(self) -> int:
        return sum(self.memory.values())

    @property
    def host_bytes(self) -> int:
        """Of all ranks of a host, in its memory."""
        return self.world.ranks_per_host * (sum(self.host_memory.values()) if self.host_memory else self.device_bytes)

    @property
    def host_available(self) -> float | None:
        hardware = self.hardware
        return hardware.memory_bytes if hardware.kind == "cpu" else hardware.host_memory_bytes


def simulate(config: Config, world: World, hardware: Hardware, setting: Setting, job: Job | None = None) -> Simulated:
    """Simulate one federation in one world.

    Args:
        job: the resolved configuration, where it is known; its clients are replaced.
    Raises:
        UserError: what a real start would refuse, but for memory, which is reported.
    """
    layout = check_layout(config.topology, world.ranks)
    job = peopled(job or resolved(config, hardware), setting)
    check_world(job, layout.ep_size, world)
    drawing_s, scheduling_s, drawn = _measured(job, world)
    count = min(setting.sampled, config.federation.rounds)
    indices = sorted({int(index) for index in np.linspace(1, config.federation.rounds, count)})
    rounds = {index: _round(job, world, hardware, index) for index in indices}
    return Simulated(
        job,
        world,
        hardware,
        setting,
        drawn,
        rounds,
        _evaluation(job, world, hardware, drawn),
        Storage.of(job, world, drawn),
        drawing_s,
        scheduling_s,
        WORK + files_of(0, world.ranks, layout.ep_size, tensors=hardware.kind == "cpu"),
    )


def resolved(config: Config, hardware: Hardware) -> Job:
    """The configuration without its clients, for `simulate`."""
    return resolve(config, kind=hardware.kind, made=placeholder)


def _without_evaluation(job: Job) -> Job:
    """The same rounds, of which none is evaluated. A new job also forgets the steps of the rounds before."""
    config = job.config
    evaluation = config.evaluation.model_copy(update={"every": _NEVER, "clients_every": 0, "client_sequences": 0})
    federation = config.federation.model_copy(update={"rounds": _NEVER})
    return replace(job, config=config.model_copy(update={"evaluation": evaluation, "federation": federation}))


def _round(job: Job, world: World, hardware: Hardware, index: int) -> Prediction:
    execution, ep_size = job.config.execution, job.config.topology.ep_size
    return predict_job(_without_evaluation(job), ep_size, execution.clients_in_flight, world, hardware, index)


def _measured(job: Job, world: World) -> tuple[float, float, int]:
    """Seconds of drawing and of scheduling round 1 on this machine, and how many take part."""
    topology, local, chosen = job.config.topology, job.config.local, job.participants(1)
    clusters, flight = world.ranks // topology.ep_size, job.config.execution.clients_in_flight
    drawing = _least(lambda: job.participants(1))
    scheduling = _least(lambda: schedule(chosen, job.cost, local, clusters, topology.ep_size, flight))
    return drawing, scheduling, len(chosen)


def _least(work: Callable[[], object]) -> float:
    """Seconds of the fastest of a few times: other programs only ever make it slower."""
    spent: list[float] = []
    while len(spent) < _REPEATS and sum(spent) < 1.0:
        began = time.perf_counter()
        work()
        spent.append(time.perf_counter() - began)
    return min(spent)


def _evaluation(job: Job, world: World, hardware: Hardware, drawn: int) -> float:
    """Seconds of all evaluations of the run, like the planner's, with few clients for many."""
    total, few = 0.0, _few(job, drawn)
    share = len(job.clients) / len(few.clients)
    kinds = Counter(Evaluation.of(job, index) for index in range(job.config.federation.rounds + 1))
    network, ep_size = Network(hardware, world), job.config.topology.ep_size
    slots = wave_slots(few, few.clients, world.ranks // ep_size)
    for kind, count in kinds.items():
        # Answers and the global hold-out are the same with any number of clients; only clients' own hold-outs grow.
        fixed = one_evaluation_seconds(few, network, hardware, ep_size, replace(kind, per_client=False), slots)
        whole = one_evaluation_seconds(few, network, hardware, ep_size, kind, slots) if kind.per_client else fixed
        if job.method.personal_models and not kind.plain:
            fixed = 0.0  # every client's own model is scored on all of it
        total += count * (fixed + share * (whole - fixed))
    return total


def _few(job: Job, drawn: int) -> Job:
    """The job with every n-th of its clients, as many of them in a round as before."""
    few = job.clients[:: max(1, len(job.clients) // SCORED)]
    federation = job.config.federation.model_copy(update={"participation": min(1.0, drawn / len(few))})
    return replace(job, clients=few, config=job.config.model_copy(update={"federation": federation}))
