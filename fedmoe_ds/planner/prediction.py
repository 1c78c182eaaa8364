"""Prediction: seconds of a round by phase, bytes by collective, memory by purpose, for one world on one kind of machine."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from fedmoe_ds.aggregation.weighing import MEAN
from fedmoe_ds.clients.local_training import Wave
from fedmoe_ds.config import Config
from fedmoe_ds.federation.schedule import largest_wave, schedule
from fedmoe_ds.methods.client_drift import keeps_variables
from fedmoe_ds.model.adapter_bank import lora_pairs, shared_blocks
from fedmoe_ds.planner.client_costs import ClientCosts
from fedmoe_ds.planner.client_state import kept_blocks, memory_bytes, row_bytes
from fedmoe_ds.planner.counts import CONTROL, SCHEDULE_S
from fedmoe_ds.planner.evaluation import Evaluation, one_evaluation_seconds
from fedmoe_ds.planner.hardware import Hardware
from fedmoe_ds.planner.legality import check_world
from fedmoe_ds.planner.network import Group, Network, Traffic
from fedmoe_ds.planner.parameters import parameters_per_client
from fedmoe_ds.planner.rank_memory import rank_memory
from fedmoe_ds.planner.training import Spent, WaveModel
from fedmoe_ds.planner.work import stage_seconds
from fedmoe_ds.planner.workload import Job, resolve
from fedmoe_ds.planner.world import World

REPORT_BYTES = 400
"""What a client's report takes as JSON."""
WINDOW_BYTES = 8
"""Of one sum's window."""


@dataclass(frozen=True)
class Prediction:
    """One round in one world.

    Attributes:
        seconds: by phase of the round event. `train` is the slowest cluster's; in a run, faster ones wait in `aggregate`.
        train_split: seconds of `train` by cause.
        traffic: by collective, on one rank.
        memory: bytes per rank by purpose, the process itself included.
        host_memory: bytes per rank by purpose on the host of a device; empty where ranks compute on the host.
        client_files: bytes per rank of clients' own state beyond its memory, in mapped files below the cache.
        tokens: trained in the round, over all clusters.
        work: predicted compute seconds of every cluster: the balance of the schedule.
        waves: most waves of a cluster.
        homeless: ranks on which no client of the round is at home: they serve their experts alone.
    """

    seconds: dict[str, float]
    train_split: dict[str, float]
    traffic: dict[str, Traffic]
    memory: dict[str, int]
    host_memory: dict[str, int]
    client_files: int
    tokens: int
    work: list[float] = field(repr=False)
    waves: int
    homeless: int

    @property
    def round_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def bytes(self) -> dict[str, float]:
        """Bytes that one rank hands over in the round, by collective."""
        return {name: traffic.bytes for name, traffic in self.traffic.items()}

    @property
    def memory_total(self) -> int:
        return sum(self.memory.values())

    @property
    def balance(self) -> float:
        """Most over mean of the clusters' work; idle clusters count."""
        mean = sum(self.work) / len(self.work)
        # No work at all is in balance.
        return max(self.work) / mean if mean else 1.0


def predict(config: Config, world: World, hardware: Hardware, round_index: int = 1) -> Prediction:
    """Predict one round; the last round evaluates every client too.

    Raises:
        UserError: what a real start would refuse.
    """
    in_flight = config.execution.clients_in_flight
    job = resolve(config, kind=hardware.kind)
    return predict_job(job, config.topology.ep_size, in_flight, world, hardware, round_index)


def predict_job(
    job: Job,
    ep_size: int,
    in_flight: int | None,
    world: World,
    hardware: Hardware,
    round_index: int = 1,
    costs: ClientCosts | None = None,
) -> Prediction:
    """The same for a resolved job, with ep_size and clients in flight as given.

    Args:
        costs: of the round's clients on this hardware, where they are known; they are the same in every topology of a world.
    """
    check_world(job, ep_size, world)
    clusters = world.ranks // ep_size
    costs = costs or ClientCosts.of(job, hardware, world.ranks_per_host, round_index)
    drawn, network = len(costs.chosen), Network(hardware, world)
    plan = schedule(costs.chosen, job.cost, job.config.local, clusters, ep_size, in_flight)
    spent, network.traffic = WaveModel(job, hardware, network, ep_size, largest_wave(plan), costs).clusters(plan)
    train = _shared_cores(spent, world, hardware, clusters)
    # Clusters meet only at the aggregation, so a round waits for the slowest one.
    slowest = max(spent, key=lambda cluster: cluster.total)
    seconds = {"schedule": SCHEDULE_S[0] + SCHEDULE_S[1] * drawn, "train": train}
    seconds["aggregate"] = _aggregate(job, network, hardware, ep_size, drawn)
    asked = Evaluation.of(job, round_index)
    seconds["evaluate"] = one_evaluation_seconds(job, network, hardware, ep_size, asked, largest_wave(plan))
    split = dict(slowest.parts)
    if train > slowest.total:
        split["other clusters on the same cores"] = train - slowest.total
    held = rank_memory(job, ep_size, in_flight, hardware, drawn, plan)
    return Prediction(
        seconds,
        split,
        network.traffic,
        held.device,
        held.host,
        held.client_files,
        costs.tokens,
        [cluster.work for cluster in spent],
        max(map(len, plan)),
        _homeless(plan, ep_size),
    )


def _homeless(plan: list[list[Wave]], ep_size: int) -> int:
    """Ranks without a client at home in any wave."""
    return sum(not any(wave[rank] for wave in waves) for waves in plan for rank in range(ep_size))


def _shared_cores(spent: list[Spent], world: World, hardware: Hardware, clusters: int) -> float:
    """Seconds until the last cluster is done, where several may share the cores of a host."""
    alone = max(cluster.total for cluster in spent)
    if hardware.kind != "cpu" or world.ranks_per_host <= hardware.slots:
        return alone
    # At least one: a cluster may be larger than a host.
    per_host = max(1, clusters // world.hosts)
    hosts = [spent[start : start + per_host] for start in range(0, clusters, per_host)]
    # Carrying messages takes the cores too; `network` has their time already stretched by the ranks that share a core.
    return max(alone, *(sum(_on_cores(cluster, hardware.slots, len(host)) for cluster in host) for host in hosts))


def _on_cores(cluster: Spent, cores: int, clusters: int) -> float:
    return cluster.work / cores + cluster.parts.get("all_to_all", 0.0) / clusters


def _share(hardware: Hardware, world: World) -> float:
    """How many ranks share a core while all of them compute."""
    return max(1.0, world.ranks_per_host / hardware.slots) if hardware.kind == "cpu" else 1.0


def _aggregate(job: Job, network: Network, hardware: Hardware, ep_size: int, participants: int) -> float:
    """Sums over clusters, reports, server step."""
    world, compute = network.world, hardware.crowded(network.world.ranks_per_host)
    cluster, shard, everyone = Group.cluster(world, ep_size), Group.shard(world, ep_size), Group.everyone(world)
    held = job.expert_layout.num_experts // ep_size
    averaged = [spec for spec in shared_blocks(job.blocks) if not (job.method.collects and spec.pair)]
    expert, dense = parameters_per_client(averaged, held)
    weights = sum(len(spec.layers) * (held if spec.expert else 1) for spec in averaged)
    dense_weights = sum(len(spec.layers) for spec in averaged if not spec.expert)
    # Two int64 digits of a number, or one float32.
    each = 16 if job.bitwise else 4
    # The changes of control or dual variables are summed beside the adapters, with weights of their own.
    statistics = [*[job.method.weighing] * len(job.method.weighing.shares), *[MEAN] * keeps_variables(job.config.local)]
    seconds = 0.0
    for group, numbers, heads in ((cluster, dense, dense_weights), (shard, expert + dense, weights)):
        # Without dense blocks (no adapters on attention, say) the ranks of a cluster have nothing to sum.
        for weighing in statistics if heads else []:
            seconds += network.all_reduce(group, 1, WINDOW_BYTES * (weighing.full + weighing.heads) * heads)
            seconds += network.all_reduce(group, 1, (weighing.full * numbers + weighing.heads * heads) * each)
    if shapes := job.method.statistics():
        numbers, heads = sum(map(math.prod, shapes.values())), sum(shape[0] for shape in shapes.values())
        for group in (cluster, shard):
            seconds += network.all_reduce(group, 1, WINDOW_BYTES * 2 * heads)
            seconds += network.all_reduce(group, 1, (numbers + heads) * each)
    if job.method.collects:
        seconds += _collect(job, network, ep_size, participants)
    if job.method.chooses_rank:
        seconds += network.control(cluster, 1, 16)
    row, clusters = row_bytes(kept_blocks(job), held), world.ranks // ep_size
    if row and clusters > 1:
        # To the clusters that train their clients, and home again; one in `clusters` is there already.
        away = participants / clusters * (1 - 1 / clusters)
        seconds += network.all_to_all(shard, 2, away * row)
    expert_layout, tiers = job.expert_layout, len(job.by_tier)
    personal = [spec for spec in job.blocks if spec.personal] + job.method.client_state(job.blocks)
    # Reports, activation counts and personal values are what these calls carry; most carry a word.
    calls = CONTROL.per_round + bool(personal) * CONTROL.personal
    calls += CONTROL.per_checkpoint / job.config.checkpoint.every
    counts = tiers * len(expert_layout.layers) * expert_layout.num_experts * 8
    # Memories travel in base64, 4 letters for 3 bytes.
    carried = participants * (REPORT_BYTES + 4 * len(personal) + memory_bytes(job) * 4 / 3) + counts
    seconds += network.control(everyone, calls, carried / world.ranks / calls)
    served = stage_seconds(compute, "serve", sum(parameters_per_client(shared_blocks(job.blocks), held)), len(job.blocks))
    return seconds + float(served) * _share(hardware, world)


def _collect(job: Job, network: Network, ep_size: int, participants: int) -> float:
    """Sums of the participants' factors (4 bytes a number) and of their weights (8 bytes each)."""
    cluster, shard = Group.cluster(network.world, ep_size), Group.shard(network.world, ep_size)
    held = job.expert_layout.num_experts // ep_size
    halves = [half for pair in lora_pairs(job.blocks) for half in pair]
    dense = [spec for spec in halves if not spec.expert]
    seconds = 0.0
    for group, specs in ((cluster, dense), (shard, halves)):
        if specs:
            weights = sum(len(spec.layers) * (held if spec.expert else 1) for spec in specs)
            seconds += network.all_reduce(group, 1, 4 * participants * sum(parameters_per_client(specs, held)))
            seconds += network.all_reduce(group, 1, 8 * participants * weights)
    return seconds
