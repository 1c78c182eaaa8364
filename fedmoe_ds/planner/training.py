"""Training: seconds of the waves of a round.

All ranks of a cluster meet in every layer of every pass, so a pass takes as long as its slowest rank. Ranks of a host share its
cores: where there are more ranks than cores, a pass takes at least the work of all of them over the cores.

Legend: C clients of a wave, P ranks of a cluster, N local steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedmoe_ds.clients.client import Client
from fedmoe_ds.clients.local_training import Wave
from fedmoe_ds.clients.optimizer import moment_bytes
from fedmoe_ds.methods import Method
from fedmoe_ds.planner.hardware import Hardware
from fedmoe_ds.planner.memory import FP32, parameters_per_client
from fedmoe_ds.planner.network import Group, Network
from fedmoe_ds.planner.work import PassWork, Rows, stage_seconds
from fedmoe_ds.planner.workload import Job

Seconds = NDArray[np.float64]


def exchanged(job: Job, training: bool, routed: float) -> tuple[float, float]:
    """(token all-to-alls of a pass, numbers that a rank hands over in them) when `routed` rows of a layer leave it.

    Of a layer: row counts (not in the numbers); rows, weights and results forward; the gradients of these three backward, but
    no gradient of the first layer's rows where no adapter lies below it. With activation checkpointing the backward pass runs
    each layer's forward exchanges again, and every layer's input gets a gradient.
    """
    layers, width = len(job.expert_layout.layers), job.expert_layout.width
    calls, numbers = 4.0 * layers, layers * routed * (2 * width + 1)
    if not training:
        return calls, numbers
    again = job.config.execution.activation_checkpointing
    below = layers if again or job.projections or job.config.adapters.moe else layers - 1
    return (1 + again) * calls + 2 * layers + below, (1 + again) * numbers + routed * (layers * (width + 1) + below * width)


@dataclass(frozen=True)
class ClientCost:
    """One client's local steps, [N] each: seconds of its rows outside the experts, routed rows of a layer, passes."""

    home: Seconds
    routed: Seconds
    passes: Seconds


@dataclass
class Spent:
    """Seconds of a wave or of a cluster's waves on the critical path, by cause; `work` is what all its ranks compute."""

    parts: dict[str, float] = field(default_factory=dict)
    work: float = 0.0

    def add(self, cause: str, seconds: float) -> None:
        self.parts[cause] = self.parts.get(cause, 0.0) + seconds

    @property
    def total(self) -> float:
        return sum(self.parts.values())


class WaveModel:
    """Predicts waves of one job on one kind of machine.

    Args:
        ep_size: ranks of a cluster.
        home: client slots per rank.
    """

    def __init__(self, job: Job, hardware: Hardware, network: Network, ep_size: int, home: int, group: Group) -> None:
        self.job, self.hardware, self.network, self.ep_size, self.home_clients = job, hardware, network, ep_size, home
        self.group = group
        self.compute, self.dtype = hardware.crowded(network.world.ranks_per_host), job.config.foundation.dtype
        self.shared = job.shares_passes
        self.work = PassWork(job, training=True)
        self.expert, self.dense = parameters_per_client(job.blocks, job.expert_layout.num_experts // ep_size)
        self.in_flight = home * (ep_size * self.expert + self.dense)
        trained = [spec for spec in job.blocks if spec.trained]
        self.expert_blocks = sum(spec.expert for spec in trained)
        self.blocks = len(trained)
        self.dense_blocks = self.blocks - self.expert_blocks
        self.cores = hardware.slots if hardware.kind == "cpu" else ep_size
        self.costs: dict[int, ClientCost] = {}

    def cost(self, client: Client, round_index: int) -> ClientCost:
        """What a client costs wherever it trains."""
        if client.index not in self.costs:
            steps, packing = self.job.steps(client, round_index), self.job.config.execution.packing
            rows = Rows(steps.samples, steps.longest, steps.targets, steps.rows if packing else None)
            home = self.work.home(rows).seconds(self.compute, self.dtype, self.work.score_flops)
            # Every row goes to `cap` experts: caps are kept by the router, not by chance.
            routed = (steps.rows * client.cap).astype(np.float64)
            self.costs[client.index] = ClientCost(np.asarray(home), routed, steps.passes.astype(np.float64))
        return self.costs[client.index]

    def wave(self, wave: Wave, round_index: int) -> Spent:
        """One wave of one cluster."""
        spent = Spent()
        costs = [[self.cost(client, round_index) for client in home] for home in wave]
        steps = max((len(cost.home) for home in costs for cost in home), default=0)
        self._passes(spent, costs, steps)
        self._optimizer(spent, costs, steps)
        self._before_and_after(spent, sum(map(len, wave)), max(map(len, wave), default=0))
        return spent

    def _passes(self, spent: Spent, costs: list[list[ClientCost]], steps: int) -> None:
        if self.shared:
            self._lockstep(spent, costs, steps, blocks=1)
            return
        # One client per rank at a time; a pass of bitwise mode then has one block of rows per peer.
        for slot in range(max(map(len, costs), default=0)):
            alone = [home[slot : slot + 1] for home in costs]
            self._lockstep(spent, alone, steps, blocks=self.ep_size)

    def _lockstep(self, spent: Spent, costs: list[list[ClientCost]], steps: int, blocks: int) -> None:
        """Passes that all ranks run together: `costs` are the clients of each rank that take part."""
        home_PN = np.stack([_total([cost.home for cost in home], steps) for home in costs])
        routed_N = sum((_total([cost.routed for cost in home], steps) for home in costs), np.zeros(steps))
        # The longest decides: ranks without rows join with empty ones, so that collectives meet.
        passes_N = np.max([_padded(cost.passes, steps) for home in costs for cost in home], axis=0, initial=0.0)
        fixed = (self.work.fixed() + self.work.gradients(self.in_flight)).seconds(self.compute, self.dtype)
        local = self.job.expert_layout.num_experts // self.ep_size
        # Routed rows of the whole wave, even over the ranks of the cluster.
        per_pass_N = routed_N / self.ep_size / np.maximum(passes_N, 1)
        experts_N = self.work.experts(per_pass_N, blocks, local).seconds(self.compute, self.dtype) * passes_N
        busy_PN = home_PN + experts_N + fixed * passes_N
        # The slowest rank, or where ranks share cores, all the work over the cores.
        critical_N = np.maximum(busy_PN.max(0), busy_PN.sum(0) / self.cores)
        spent.add("compute", float(busy_PN.mean(0).sum()))
        # The mean is compute and the rest waiting: their sum is the critical path.
        spent.add("waiting", float((critical_N - busy_PN.mean(0)).sum()))
        spent.work += float(busy_PN.sum())
        self._exchanges(spent, float(passes_N.sum()), float(routed_N.sum()) / self.ep_size)

    def _exchanges(self, spent: Spent, passes: float, rows: float) -> None:
        """Token all-to-alls; `rows` leave a rank, per layer, over all passes."""
        if self.ep_size == 1 or passes == 0:
            return
        expert_layout, layers = self.job.expert_layout, len(self.job.expert_layout.layers)
        calls, numbers = exchanged(self.job, True, rows / passes)
        counts = expert_layout.num_experts * (self.home_clients if self.shared else 1) * 8 * (1 + self.work.recompute)
        size = numbers * self.work.number_bytes + layers * counts
        spent.add("all_to_all", self.network.all_to_all(self.group, calls * passes, size / calls))

    def _optimizer(self, spent: Spent, costs: list[list[ClientCost]], steps: int) -> None:
        everyone = [cost for home in costs for cost in home]
        all_steps = float(sum(len(cost.home) for cost in everyone))
        at_home = [float(sum(len(cost.home) for cost in home)) for home in costs]
        shared = stage_seconds(self.compute, "update", self.expert * all_steps, self.expert_blocks * all_steps)
        own = [stage_seconds(self.compute, "update", self.dense * n, self.dense_blocks * n) for n in at_home]
        norms = 0.0
        if self.job.config.local.clip is not None:
            norms = stage_seconds(self.compute, "norm", self.in_flight * steps, self.blocks * steps)
            # Norms travel as float64.
            bytes_ = 8 * (self.expert_norms + self.dense_norms)
            spent.add("norms", self.network.all_gather(self.group, 2 * steps, bytes_ / 2))
        self._busy(spent, "optimizer", [shared + norms + mine for mine in own])

    @property
    def expert_norms(self) -> int:
        """Gradient norms of single expert items that a rank sends in a step."""
        local = self.job.expert_layout.num_experts // self.ep_size
        items = sum(len(spec.layers) for spec in self.job.blocks if spec.expert and spec.trained)
        return items * local * self.ep_size * self.home_clients

    @property
    def dense_norms(self) -> int:
        return sum(len(spec.layers) for spec in self.job.blocks if spec.trained and not spec.expert) * self.home_clients

    def _before_and_after(self, spent: Spent, clients: int, most_at_home: int) -> None:
        """The wave moves in, reports, and is folded into the sums."""
        # In float32 numbers, whatever type moments are kept in.
        moments = moment_bytes(self.job.config.local) / FP32
        ranks = [1.0] * self.ep_size
        moved = stage_seconds(self.compute, "move", self.in_flight * (2 + moments), self.blocks)
        checked = stage_seconds(self.compute, "norm", self.in_flight, self.blocks)
        self._busy(spent, "set-up", [(moved + checked) * each for each in ranks])
        numbers = clients * self.expert + most_at_home * self.dense
        blocks = clients * self.expert_blocks + most_at_home * self.dense_blocks
        folded = stage_seconds(self.compute, "fold", numbers, blocks)
        self._busy(spent, "fold", [folded * each for each in ranks])
        expert_layout = self.job.expert_layout
        counts = self.home_clients * len(expert_layout.layers) * expert_layout.num_experts * 8
        reports = self.network.all_gather(self.group, 2, counts)
        reports += self.network.all_gather(self.group, 2, 8 * self.ep_size * self.home_clients)
        # Only methods that measure something gather it.
        if type(self.job.method).measure is not Method.measure:
            reports += self.network.all_gather(self.group, 2 * clients, counts / max(self.home_clients, 1))
        reports += self.network.control(self.group, 1, 1)
        spent.add("reports", reports)

    def _busy(self, spent: Spent, cause: str, seconds: list[float]) -> None:
        """Work of all ranks of the cluster, which may have to share cores."""
        spent.work += sum(seconds)
        spent.add(cause, max(max(seconds), sum(seconds) / self.cores))


def _padded(values: Seconds, steps: int) -> Seconds:
    return np.pad(values, (0, steps - len(values)))


def _total(parts: list[Seconds], steps: int) -> Seconds:
    return sum((_padded(part, steps) for part in parts), np.zeros(steps))
