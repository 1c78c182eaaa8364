"""Wireless federated learning with heterogeneous data (Han, Li, Chen, Mei, Wei, Ding, Poor; arXiv 2308.03521, IEEE TWC 2024).

Legend: N candidates (the round's drawn clients), M numbers of epochs that are tried, C labels of the data.

READ (abstract): a convergence bound in closed form that depends on the vectors of data set sizes and of data divergence; from
it scheduling, uplink power, channel allocation and local epochs are chosen together, under long-term limits on energy and
latency; Lyapunov's drift plus penalty turns that into one problem per round. NOT FOUND: the bound, the algorithm's steps, its
constants. What follows is our COMPLETION with the textbook models of that literature (KNOWN). In every round,

    time     T_cmp = E W_k / f,   r = B log2(1 + p h / (B N0)),   T_up = S / r,   T_cmp + T_up <= T
    power    p = (B N0 / h) (2^(S / (B (T - T_cmp))) - 1), the least that meets the deadline; p > p_max: k is not scheduled
    energy   e_k(E) = kappa E W_k f^2 + p T_up
    queue    Z_k <- max(Z_k + e_k - Ebar, 0): how far k is beyond what it may spend per round on average; e_k = 0 for the idle
    choice   minimise  sum_{k in A} (Z_k e_k(E) - V p_k (1 + omega (1 - d_k)) g(E))  over E and A, at most J clients (channels)

with p_k = |D_k| / |D|, d_k = the total variation between the label distributions of the client and of all, g(E) = 1 - 2^-E
(each epoch gains half of what the one before did), W_k = the predicted FLOPs of an epoch over FLOPs per cycle, S = the bits
of the adapters that it sends. The sum is separable: for a given E the best A is the J smallest negative terms, and E is tried
one by one, so the choice is exact. Between two participations the queue only sinks, so a client's memory is its queue and the
round of it. Training is plain FedAvg. An epoch is the local work that the configuration names (`local.epochs: 1` makes it one).
Where several choices are equally good the fewest epochs win, then the first clients. V -> 0 schedules nobody whose queue is not
empty. A round in which nobody is worth it, or can meet the deadline, changes nothing.

`schedule: random` draws J of those who can meet the deadline with all epochs: what the choice is to be compared with; equal
`least_epochs` and `epochs` fix E. Limits: the downlink is free (a broadcast at full power), all devices are alike but for their
data, distance and fading, and a client whose training fails keeps its queue.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedmoe_ds.methods import (
    Band,
    Client,
    ClientUpdate,
    Config,
    Method,
    MethodInfo,
    MethodParams,
    PlanContext,
    RoundPlan,
    Spending,
    UserError,
    computing_joules,
    counts_of,
    distances,
    fading,
    generator,
    path_gain,
    watts,
)

Floats = NDArray[np.float64]


class WirelessParams(MethodParams):
    """The choice's coefficients and the devices' physics."""

    schedule: Literal["joint", "random"] = Field("joint", description="the paper's choice, or clients drawn by lot")
    channels: int = Field(5, ge=1, description="J: most clients of a round")
    least_epochs: int = Field(1, ge=1, le=64, description="fewest epochs that are tried")
    epochs: int = Field(5, ge=1, le=64, description="most epochs that are tried")
    trade_off: float = Field(1.0, gt=0, description="V: joules that a whole unit of utility is worth")
    divergence: float = Field(1.0, ge=0, description="omega: how much more clients are worth whose labels are like everybody's")
    deadline_s: float = Field(10.0, gt=0, description="T: seconds of computing and sending in a round")
    energy_j: float | None = Field(None, gt=0, description="Ebar: joules per client and round, on average; null: no limit")
    power_w: float = Field(0.1, gt=0, description="p_max")
    bandwidth_hz: float = Field(1e6, gt=0, description="B: of one channel")
    noise_dbm_hz: float = Field(-174.0, description="N0")
    radius_m: float = Field(500.0, ge=10, description="of the cell, over which clients are evenly spread")
    clock_hz: float = Field(1e9, gt=0, description="f")
    flops_per_cycle: float = Field(4.0, gt=0, description="what a cycle of the device computes")
    capacitance: float = Field(1e-28, gt=0, description="kappa: joules per cycle at 1 Hz")

    def idle(self, config: Config) -> dict[str, str]:
        if self.schedule == "joint":
            return {}
        reason = "with method.schedule=random: clients are drawn by lot"
        return dict.fromkeys(("least_epochs", "trade_off", "divergence", "energy_j"), reason)


@dataclass(frozen=True)
class Task:
    """A scheduled client's part of the plan.

    Attributes:
        queue: its virtual queue before this round.
        power: watts that it sends with.
        joules: of computing and sending.
    """

    round: int
    epochs: int
    queue: float
    power: float
    joules: float


@dataclass(frozen=True)
class Offers:
    """What candidates would do with every number of epochs: seconds of computing, least power (infinite: no time), energy."""

    epochs_M: list[int]
    computing_MN: Floats
    power_MN: Floats
    joules_MN: Floats


def best_choice(term_MN: Floats, most: int) -> tuple[int, list[int]]:
    """(place among M, places among N) of at most `most` clients whose terms have the smallest sum."""
    best: tuple[float, int, list[int]] = (0.0, 0, [])
    for place, term_N in enumerate(term_MN):
        ranked = np.argsort(term_N, kind="stable")[:most]
        chosen = sorted(ranked[term_N[ranked] < 0.0].tolist())
        # fsum: rounded once, so that equally good choices are equal in any order of their clients.
        total = math.fsum(term_N[chosen])
        if total < best[0]:
            best = total, place, chosen
    return best[1], best[2]


def divergence(counts_NC: NDArray[np.int64], all_C: NDArray[np.int64]) -> Floats:
    """Total variation between every client's label distribution and that of all, in [0, 1]."""
    shares_NC = counts_NC / counts_NC.sum(1, keepdims=True)
    distance_N: Floats = 0.5 * np.abs(shares_NC - all_C / all_C.sum()).sum(1)
    return distance_N


def drained(queue: float, limit: float, rounds: int) -> float:
    """A virtual queue after so many rounds in which its client idled."""
    return max(queue - limit * rounds, 0.0)


class WirelessFL(Method):
    """Who trains, for how long and at which power: chosen anew in every round under long-term limits."""

    Params: ClassVar[type[MethodParams]] = WirelessParams
    info = MethodInfo(
        title="Wireless FL",
        paper="arXiv 2308.03521",
        adapts="participants, epochs, power",
        trains="what the configuration trains",
        sends="adapters",
        weighs="data size, over scheduled clients",
        completion="textbook channel and energy; utility in place of the bound; exact choice",
    )
    accounts = True

    def check_config(self, config: Config) -> None:
        params = self.params
        if params.least_epochs > params.epochs:
            raise UserError(
                f"method.least_epochs: {params.least_epochs}: more than method.epochs={params.epochs}; use at most as many"
            )

    def memory(self) -> dict[str, tuple[int, ...]]:
        return {"queue": (), "round": ()}

    def plan(self, context: PlanContext) -> RoundPlan:
        offers, queue_N = self._offers(context), self._queues(context)
        random = self.params.schedule == "random"
        place, chosen = self._random(context, offers) if random else self._joint(context, offers, queue_N)
        epochs = offers.epochs_M[place]
        participants, parts, spending = list[Client](), dict[int, Task](), dict[int, Spending]()
        for n in chosen:
            client, joules = context.drawn[n], float(offers.joules_MN[place, n])
            participants.append(replace(client, steps=epochs * context.load(client).steps))
            parts[client.index] = Task(context.round, epochs, float(queue_N[n]), float(offers.power_MN[place, n]), joules)
            computing = float(offers.computing_MN[place, n])
            # At the least power, sending takes what the deadline leaves.
            spending[client.index] = Spending(computing, self.params.deadline_s - computing, joules)
        return RoundPlan(participants, parts, spending)

    def memorise(self, update: ClientUpdate) -> dict[str, np.ndarray]:
        task: Task = update.plan
        queue = 0.0 if self.params.energy_j is None else max(task.queue + task.joules - self.params.energy_j, 0.0)
        return {"queue": np.array(queue), "round": np.array(float(task.round))}

    def _joint(self, context: PlanContext, offers: Offers, queue_N: Floats) -> tuple[int, list[int]]:
        gain_M1 = 1.0 - 0.5 ** np.array(offers.epochs_M, np.float64)[:, None]
        term_MN = queue_N * offers.joules_MN - self.params.trade_off * gain_M1 * self._worth(context)
        return best_choice(np.where(self._feasible(offers), term_MN, math.inf), self.params.channels)

    def _random(self, context: PlanContext, offers: Offers) -> tuple[int, list[int]]:
        (able,) = np.nonzero(self._feasible(offers)[-1])
        drawn = generator(self.facts.seed, "wireless-schedule", context.round).permutation(able)
        return len(offers.epochs_M) - 1, sorted(drawn[: self.params.channels].tolist())

    def _feasible(self, offers: Offers) -> NDArray[np.bool_]:
        feasible_MN: NDArray[np.bool_] = offers.power_MN <= self.params.power_w
        return feasible_MN

    def _offers(self, context: PlanContext) -> Offers:
        params, loads = self.params, [context.load(client) for client in context.drawn]
        # Drawn by lot, clients do all epochs: there is nothing to try.
        least = params.epochs if params.schedule == "random" else params.least_epochs
        epochs_M = list(range(least, params.epochs + 1))
        band = Band(params.bandwidth_hz, watts(params.noise_dbm_hz))
        cycles_MN = np.outer(epochs_M, [load.flops for load in loads]) / params.flops_per_cycle
        computing_MN = cycles_MN / params.clock_hz
        left_MN = params.deadline_s - computing_MN
        bits_N = 8.0 * np.array([load.up_bytes for load in loads])
        power_MN = band.least_power(bits_N, left_MN, self._gain(context))
        # Who has no time left sends nothing; its infinite power says that it cannot take part.
        sending_MN = np.where(np.isfinite(power_MN), power_MN, 0.0) * np.maximum(left_MN, 0.0)
        joules_MN = computing_joules(cycles_MN, params.clock_hz, params.capacitance) + sending_MN
        return Offers(epochs_M, computing_MN, power_MN, joules_MN)

    def _gain(self, context: PlanContext) -> Floats:
        seed, indices = self.facts.seed, [client.index for client in context.drawn]
        return path_gain(distances(seed, indices, self.params.radius_m)) * fading(seed, context.round, indices)

    def _worth(self, context: PlanContext) -> Floats:
        """p_k (1 + omega (1 - d_k)) of every candidate."""
        share_N = counts_of(context.drawn, "samples") / counts_of(context.clients, "samples").sum()
        if self.params.divergence == 0.0:
            return share_N
        counts_NC = context.labels()
        if not counts_NC.shape[1]:
            raise UserError(
                f"method.divergence: {self.params.divergence}: the data have no labels whose distributions could differ; use 0"
            )
        own_NC = counts_NC[[client.index for client in context.drawn]]
        return share_N * (1.0 + self.params.divergence * (1.0 - divergence(own_NC, counts_NC.sum(0))))

    def _queues(self, context: PlanContext) -> Floats:
        limit = self.params.energy_j
        memories = [context.memories.get(client.index) for client in context.drawn]
        if limit is None:
            return np.zeros(len(memories))
        # Rounds between its last one and this one, in which it idled.
        return np.array(
            [0.0 if m is None else drained(float(m["queue"]), limit, context.round - 1 - int(m["round"])) for m in memories]
        )
