"""Training: seconds of the waves of a round.

All ranks of a cluster meet in every layer of every pass, so a pass takes as long as its slowest rank. Ranks of a host share its
cores: where there are more ranks than cores, a pass takes at least the work of all of them over the cores.

All waves of a plan are computed at once. Legend: C clients of a round, W waves of all clusters, P ranks of a cluster, N local
steps of the client with the most.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedmoe_ds.clients.local_training import Wave
from fedmoe_ds.clients.optimizer import moment_bytes
from fedmoe_ds.model.client_slots import ClientSlots
from fedmoe_ds.planner.activations import FP32
from fedmoe_ds.planner.client_costs import ClientCosts
from fedmoe_ds.planner.counts import CONTROL
from fedmoe_ds.planner.exchanges import exchanged, hidden, parts_of
from fedmoe_ds.planner.hardware import Hardware
from fedmoe_ds.planner.network import Group, Network, Traffic, wire_shares
from fedmoe_ds.planner.parameters import parameters_per_client
from fedmoe_ds.planner.work import PassWork, stage_seconds
from fedmoe_ds.planner.workload import Job

Floats = NDArray[np.float64]
Places = NDArray[np.int64]

_CELLS = 2**22
"""Numbers of a table [W, P, N] at a time: 32 MiB of float64."""


@dataclass
class Spent:
    """Seconds of a cluster's waves on the critical path, by cause; `work` is what all its ranks compute."""

    parts: dict[str, float] = field(default_factory=dict)
    work: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class _Seats:
    """Who trains where: wave, rank, place on the rank and row of the costs, [C] each; and the cluster of every wave, [W]."""

    wave: Places
    rank: Places
    slot: Places
    row: Places
    cluster: Places

    @classmethod
    def of(cls, plan: list[list[Wave]], costs: ClientCosts) -> _Seats:
        seats, clusters, wave = [], [], 0
        for cluster, waves in enumerate(plan):
            for homes in waves:
                clusters.append(cluster)
                for rank, home in enumerate(homes):
                    seats += [(wave, rank, slot, costs.row[client.index]) for slot, client in enumerate(home)]
                wave += 1
        wave_C, rank_C, slot_C, row_C = np.array(seats, dtype=np.int64).reshape(-1, 4).T
        return cls(wave_C, rank_C, slot_C, row_C, np.array(clusters, dtype=np.int64))

    def chunks(self, ranks: int, steps_C: Places) -> Iterator[tuple[slice, slice]]:
        """(seats, waves) of so few waves that their tables stay small. Seats are in the order of waves."""
        most = max(1, _CELLS // max(1, ranks * int(steps_C.max(initial=1))))
        for first in range(0, len(self.cluster), most):
            last = min(first + most, len(self.cluster))
            begin, end = np.searchsorted(self.wave, [first, last])
            yield slice(int(begin), int(end)), slice(first, last)


class WaveModel:
    """Predicts the waves of one job on one kind of machine.

    Args:
        ep_size: ranks of a cluster.
        most: clients of the largest wave of any cluster: every rank holds as many slots for experts.
    """

    def __init__(self, job: Job, hardware: Hardware, network: Network, ep_size: int, most: int, costs: ClientCosts) -> None:
        self.job, self.hardware, self.network, self.ep_size = job, hardware, network, ep_size
        self.slots = ClientSlots(most, ep_size)
        self.group, self.costs = Group.cluster(network.world, ep_size), costs
        self.compute = hardware.crowded(network.world.ranks_per_host)
        self.work, self.halves = PassWork(job, training=True), parts_of(job, ep_size)
        self.expert, self.dense = parameters_per_client(job.blocks, job.expert_layout.num_experts // ep_size)
        # Of the rank that has most clients at home.
        self.in_flight = self.slots.clients * self.expert + self.slots.most * self.dense
        trained = [spec for spec in job.blocks if spec.trained]
        self.expert_blocks = sum(spec.expert for spec in trained)
        self.blocks = len(trained)
        self.dense_blocks = self.blocks - self.expert_blocks
        self.cores = hardware.slots if hardware.kind == "cpu" else ep_size

    def clusters(self, plan: list[list[Wave]]) -> tuple[list[Spent], dict[str, Traffic]]:
        """Every cluster's training, and what a rank of the slowest one sends and waits for."""
        seats = _Seats.of(plan, self.costs)
        waves = _Waves(self, seats)
        waves.passes()
        waves.optimizer()
        waves.before_and_after()
        by_cluster = {cause: np.bincount(seats.cluster, seconds, len(plan)) for cause, seconds in waves.parts.items()}
        work = np.bincount(seats.cluster, waves.work, len(plan))
        spent = [
            Spent({cause: float(seconds[i]) for cause, seconds in by_cluster.items()}, float(work[i])) for i in range(len(plan))
        ]
        slowest = max(range(len(spent)), key=lambda i: spent[i].total)
        return spent, waves.traffic_of(slowest)


class _Waves:
    """Seconds of all waves by cause, [W] each, as they are added up."""

    def __init__(self, model: WaveModel, seats: _Seats) -> None:
        self.model, self.seats, self.count = model, seats, len(seats.cluster)
        self.parts: dict[str, Floats] = defaultdict(lambda: np.zeros(self.count))
        self.work = np.zeros(self.count)
        self.sent: list[tuple[str, Floats, Floats, Floats]] = []
        steps_C = model.costs.steps_C[seats.row]
        self.steps = np.zeros(self.count, dtype=np.int64)
        np.maximum.at(self.steps, seats.wave, steps_C)
        shape = (self.count, model.ep_size)
        place = seats.wave * model.ep_size + seats.rank
        self.steps_WP = np.bincount(place, steps_C, self.count * model.ep_size).reshape(shape)
        self.clients_WP = np.bincount(place, minlength=self.count * model.ep_size).reshape(shape)

    def traffic_of(self, cluster: int) -> dict[str, Traffic]:
        """Calls, bytes and seconds of the waves of one cluster."""
        own, found = self.seats.cluster == cluster, dict[str, Traffic]()
        for name, calls, sizes, seconds in self.sent:
            booked = (float(values[own].sum()) for values in (calls, calls * sizes, seconds))
            calls_all, size_all, waited = booked
            found.setdefault(name, Traffic()).add(calls_all, size_all, waited, wire_shares(name, self.model.group))
        return {name: traffic for name, traffic in found.items() if traffic.calls}

    def _send(self, name: str, calls: Floats, sizes: Floats, each: Floats) -> Floats:
        """Book collectives of every wave; their seconds."""
        seconds = calls * each * self.model.network.crowding
        if self.model.ep_size > 1:
            self.sent.append((name, calls, sizes, seconds))
        return seconds

    def _busy(self, cause: str, seconds_WP: Floats) -> None:
        """Work of all ranks of a cluster, which may have to share cores."""
        total = seconds_WP.sum(1)
        self.work += total
        self.parts[cause] += np.maximum(seconds_WP.max(1), total / self.model.cores)

    def passes(self) -> None:
        """Forward and backward passes of all local steps."""
        costs, seats, model = self.model.costs, self.seats, self.model
        for members, waves in seats.chunks(model.ep_size, costs.steps_C):
            if model.job.shares_passes:
                self._lockstep(np.arange(members.start, members.stop), waves, blocks=1)
                continue
            # One client per rank at a time; a pass of bitwise mode then has one block of rows per peer that has such a slot.
            slots = seats.slot[members]
            for slot in range(int(slots.max(initial=-1)) + 1):
                blocks = sum(slot < at_home for at_home in model.slots.at_home)
                self._lockstep(members.start + np.flatnonzero(slots == slot), waves, blocks)

    def _lockstep(self, members: Places, waves: slice, blocks: int) -> None:
        """Passes that all ranks of a wave run together: `members` are the seats that take part."""
        model, count = self.model, waves.stop - waves.start
        home, routed, passes = model.costs.padded(self.seats.row[members])
        wave = self.seats.wave[members] - waves.start
        home_WPN = np.zeros((count * model.ep_size, home.shape[1]))
        np.add.at(home_WPN, wave * model.ep_size + self.seats.rank[members], home)
        home_WPN = home_WPN.reshape(count, model.ep_size, -1)
        routed_WN, passes_WN = np.zeros((2, count, home.shape[1]))
        np.add.at(routed_WN, wave, routed)
        # The longest decides: ranks without rows join with empty ones, so that collectives meet.
        np.maximum.at(passes_WN, wave, passes)
        fixed = model.work.seconds(model.work.fixed() + model.work.gradients(model.in_flight), model.compute)
        local = model.job.expert_layout.num_experts // model.ep_size
        # Routed rows of the whole wave, even over the ranks of the cluster.
        per_pass_WN = routed_WN / model.ep_size / np.maximum(passes_WN, 1)
        arrived = model.work.experts(per_pass_WN, blocks, local, model.halves)
        experts_WN = model.work.seconds(arrived, model.compute) * passes_WN
        busy_WPN = home_WPN + (experts_WN + fixed * passes_WN)[:, None]
        # The slowest rank, or where ranks share cores, all the work over the cores.
        critical_WN = np.maximum(busy_WPN.max(1), busy_WPN.sum(1) / model.cores)
        mean_W = busy_WPN.mean(1).sum(1)
        self.parts["compute"][waves] += mean_W
        # The mean is compute and the rest waiting: their sum is the critical path.
        self.parts["waiting"][waves] += critical_WN.sum(1) - mean_W
        self.work[waves] += busy_WPN.sum((1, 2))
        self._exchanges(waves, passes_WN.sum(1), routed_WN.sum(1) / model.ep_size, experts_WN.sum(1))

    def _exchanges(self, waves: slice, passes_W: Floats, rows_W: Floats, products_W: Floats) -> None:
        """Token all-to-alls; `rows` leave a rank, per layer, over all passes. What `products` hide is not waited for."""
        model, layout = self.model, self.model.job.expert_layout
        if model.ep_size == 1 or not layout.layers:
            return
        calls, numbers_W = exchanged(model.job, True, rows_W / np.maximum(passes_W, 1), model.halves)
        slots = model.slots.most if model.job.shares_passes else 1
        counts = layout.num_experts * slots * 8 * (1 + model.work.recompute)
        sizes_W = (numbers_W * model.work.number_bytes + len(layout.layers) * counts) / calls
        each, booked = model.network.all_to_all_seconds(model.group, sizes_W), np.zeros((2, self.count))
        booked[:, waves] = calls * passes_W, sizes_W
        every = np.zeros(self.count)
        every[waves] = each
        seconds = self._send("all_to_all", booked[0], booked[1], every)
        self.parts["all_to_all"] += seconds
        # All but the counts, which the host waits for before anything sets out.
        of_rows = 1.0 - len(layout.layers) * (1 + model.work.recompute) / calls
        self.parts["all_to_all"][waves] -= hidden(model.job, model.halves, seconds[waves] * of_rows, products_W)

    def optimizer(self) -> None:
        """The steps of all clients: experts' blocks on every rank, the others at home."""
        model, steps_W = self.model, self.steps_WP.sum(1)
        shared = stage_seconds(model.compute, "update", model.expert * steps_W, model.expert_blocks * steps_W)
        own = stage_seconds(model.compute, "update", model.dense * self.steps_WP, model.dense_blocks * self.steps_WP)
        norms = np.zeros(self.count)
        if model.job.config.local.clip is not None:
            norms = stage_seconds(model.compute, "norm", model.in_flight * self.steps, model.blocks * self.steps)
            # Norms travel as float64.
            size: Floats = np.full(self.count, 8.0 * (self._expert_norms + self._dense_norms) / 2)
            each = model.network.all_gather_seconds(model.group, size)
            self.parts["norms"] += self._send("all_gather", self.steps * np.float64(2.0), size, each)
        self._busy("optimizer", own + (shared + norms)[:, None])

    @property
    def _expert_norms(self) -> int:
        """Gradient norms of single expert items that a rank sends in a step."""
        model = self.model
        local = model.job.expert_layout.num_experts // model.ep_size
        items = sum(len(spec.layers) for spec in model.job.blocks if spec.expert and spec.trained)
        return items * local * model.slots.clients

    @property
    def _dense_norms(self) -> int:
        dense = sum(len(spec.layers) for spec in self.model.job.blocks if spec.trained and not spec.expert)
        return dense * self.model.slots.most

    def before_and_after(self) -> None:
        """Waves move in, report, and are folded into the sums."""
        model = self.model
        # In float32 numbers, whatever type moments are kept in.
        moments = moment_bytes(model.job.config.local) / FP32
        moved = stage_seconds(model.compute, "move", model.in_flight * (2 + moments), model.blocks)
        checked = stage_seconds(model.compute, "norm", model.in_flight, model.blocks)
        self._busy("set-up", np.full((self.count, model.ep_size), moved + checked))
        clients_W: Floats
        clients_W, most_W = self.clients_WP.sum(1).astype(np.float64), self.clients_WP.max(1, initial=0)
        numbers_W = clients_W * model.expert + most_W * model.dense
        blocks_W = clients_W * model.expert_blocks + most_W * model.dense_blocks
        folded_W = stage_seconds(model.compute, "fold", numbers_W, blocks_W)
        self._busy("fold", np.repeat(folded_W[:, None], model.ep_size, 1))
        layout, ones = model.job.expert_layout, np.ones(self.count)
        # Routed and trained rows, tokens and targets by home slot; by slot of the wave whether all is finite.
        home, clients = model.slots.most, model.slots.clients
        counts = home * len(layout.layers) * layout.num_experts * 8
        gathered: list[tuple[Floats, float]] = [(2.0 * ones, counts), (ones, 16 * home), (ones, 8 * clients)]
        # Only methods that measure something gather it.
        if model.job.method.overrides("measure"):
            gathered.append((2.0 * clients_W, counts / max(home, 1)))
        for calls_W, size in gathered:
            each = model.network.all_gather_seconds(model.group, size)
            self.parts["reports"] += self._send("all_gather", calls_W, size * ones, each * ones)
        # A cluster of one rank has nobody to ask whether to stop.
        asked, each = CONTROL.per_wave * (model.ep_size > 1), model.network.control_seconds(model.group, 1.0)
        self.parts["reports"] += self._send("control", asked * ones, ones, each * ones)
