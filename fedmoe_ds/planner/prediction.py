"""Prediction: seconds of a round by phase, bytes by collective, memory by purpose, for one world on one kind of machine."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from fedmoe_ds.clients.client import Client, tiers_of
from fedmoe_ds.clients.local_training import Wave
from fedmoe_ds.config import Config
from fedmoe_ds.federation.schedule import home_clients, largest_wave, schedule
from fedmoe_ds.model.adapter_bank import lora_pairs, shared_blocks
from fedmoe_ds.planner.evaluation import Evaluation, one_evaluation_seconds
from fedmoe_ds.planner.hardware import Hardware
from fedmoe_ds.planner.legality import check_world
from fedmoe_ds.planner.memory import COPY, HOST_MOMENTS, PASS, estimate, outlasting, parameters_per_client
from fedmoe_ds.planner.network import Group, Network, Traffic
from fedmoe_ds.planner.training import Spent, WaveModel
from fedmoe_ds.planner.work import stage_seconds
from fedmoe_ds.planner.workload import Job, resolve
from fedmoe_ds.planner.world import World

REPORT_BYTES = 400
"""What a client's report takes as JSON."""
WINDOW_BYTES = 16
"""Of the windows of one weight's sums: its values' and its own."""


@dataclass(frozen=True)
class Prediction:
    """One round in one world.

    Attributes:
        seconds: by phase of the round event. `train` is the slowest cluster's; in a run, faster ones wait in `aggregate`.
        train_split: seconds of `train` by cause.
        traffic: by collective, on one rank.
        memory: bytes per rank by purpose, the process itself included.
        tokens: trained in the round, over all clusters.
        work: predicted compute seconds of every cluster: the balance of the schedule.
        waves: most waves of a cluster.
    """

    seconds: dict[str, float]
    train_split: dict[str, float]
    traffic: dict[str, Traffic]
    memory: dict[str, int]
    tokens: int
    work: list[float] = field(repr=False)
    waves: int

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
    job: Job, ep_size: int, in_flight: int | None, world: World, hardware: Hardware, round_index: int = 1
) -> Prediction:
    """The same for a resolved job, with ep_size and clients in flight as given."""
    check_world(job, ep_size, world)
    clusters = world.ranks // ep_size
    chosen = job.participants(round_index)
    network = Network(hardware, world)
    group = Group.cluster(world, ep_size)
    home = home_clients(in_flight, len(chosen), ep_size)
    model = WaveModel(job, hardware, network, ep_size, home, group)
    plan = schedule(chosen, job.cost, job.config.local, clusters, ep_size, in_flight)
    spent, traffic = _slowest(model, network, plan, round_index)
    network.traffic = traffic
    train = _shared_cores(spent, world, hardware, clusters)
    # Clusters meet only at the aggregation, so a round waits for the slowest one.
    slowest = max(spent, key=lambda cluster: cluster.total)
    seconds = {"schedule": _schedule(job, hardware, len(chosen)), "train": train}
    seconds["aggregate"] = _aggregate(job, network, hardware, ep_size, len(chosen))
    seconds["evaluate"] = one_evaluation_seconds(job, network, hardware, ep_size, Evaluation.of(job, round_index))
    split = dict(slowest.parts)
    if train > slowest.total:
        split["other clusters on the same cores"] = train - slowest.total
    return Prediction(
        seconds,
        split,
        network.traffic,
        predict_memory(job, ep_size, in_flight, hardware, len(chosen), plan),
        int(sum(job.steps(client, round_index).rows.sum() for client in chosen)),
        [cluster.work for cluster in spent],
        max(map(len, plan)),
    )


def _slowest(
    model: WaveModel, network: Network, plan: list[list[list[list[Client]]]], round_index: int
) -> tuple[list[Spent], dict[str, Traffic]]:
    """Every cluster's training, and the traffic of the slowest one."""
    found: list[tuple[Spent, dict[str, Traffic]]] = []
    for waves in plan:
        # Booked per cluster: the prediction shows one rank's bytes, not the sum of all.
        network.traffic = {}
        total = Spent()
        for wave in waves:
            spent = model.wave(wave, round_index)
            total.work += spent.work
            for cause, seconds in spent.parts.items():
                total.add(cause, seconds)
        found.append((total, network.traffic))
    return [spent for spent, _ in found], max(found, key=lambda pair: pair[0].total)[1]


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


def _schedule(job: Job, hardware: Hardware, participants: int) -> float:
    # Calls of the schedule itself, counted once and per participant.
    return (50 + 20 * participants) * hardware.compute.call_s


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
    # SCAFFOLD sums the changes of control variates beside the adapters.
    times = 2 if job.config.local.drift == "scaffold" else 1
    seconds = 0.0
    for group, numbers, heads in ((cluster, dense, dense_weights), (shard, expert + dense, weights)):
        # Without dense blocks (no adapters on attention, say) the ranks of a cluster have nothing to sum.
        if heads:
            seconds += network.all_reduce(group, times, WINDOW_BYTES * heads)
            seconds += network.all_reduce(group, times, (numbers + heads) * each)
    if job.method.collects:
        seconds += _collect(job, network, ep_size, participants)
    expert_layout, tiers = job.expert_layout, len(tiers_of(job.clients))
    personal = [spec for spec in job.blocks if spec.personal] + job.method.client_state(job.blocks)
    seconds += network.control(everyone, 1 + bool(personal), participants / world.ranks * REPORT_BYTES)
    seconds += network.control(everyone, 1, tiers * len(expert_layout.layers) * expert_layout.num_experts * 8 / world.ranks)
    seconds += network.control(everyone, 1 + 2 * len(personal), 4 * participants / world.ranks)
    served = stage_seconds(compute, "serve", sum(parameters_per_client(shared_blocks(job.blocks), held)), len(job.blocks))
    return seconds + served * _share(hardware, world)


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


def shared_passes(plan: list[list[Wave]]) -> set[tuple[int, float]]:
    """(clients of a rank, their mean number of active experts) of all passes that clients share.

    Rows of a whole wave meet at the experts, the same number on every rank of its cluster.
    """
    found = set()
    for wave in (wave for waves in plan for wave in waves):
        arriving = sum(client.cap for home in wave for client in home) / len(wave)
        found |= {(len(home), arriving / len(home)) for home in wave if home}
    return found


def predict_memory(
    job: Job,
    ep_size: int,
    in_flight: int | None,
    hardware: Hardware,
    participants: int,
    plan: list[list[Wave]] | None = None,
) -> dict[str, int]:
    """Bytes of rank 0 by purpose; the other ranks hold as much or less.

    Args:
        plan: waves of every cluster, where a schedule is known; else all slots are taken by clients of the largest cap.
    """
    topology = job.config.topology.model_copy(update={"ep_size": ep_size, "clusters": None})
    execution = job.config.execution.model_copy(update={"clients_in_flight": in_flight})
    spec = replace(job, config=job.config.model_copy(update={"topology": topology, "execution": execution}))
    home = home_clients(in_flight, participants, ep_size)
    passes: set[tuple[int, float | None]] = {(home, None)}
    if not spec.shares_passes:
        passes = {(1, None)}
    elif plan is not None:
        passes = {*shared_passes(plan)} or passes
    # A bank has slots for the largest wave of any cluster, as `wave_slots` says of a start.
    flight = min(in_flight or participants, participants) if plan is None else largest_wave(plan)
    held = (estimate(spec, home, job.length, *each, in_flight=flight) for each in passes)
    # The pass with the largest activations decides; everything else is the same in all of them.
    found = {"process": int(hardware.baseline_bytes + hardware.main_extra_bytes), **max(held, key=lambda one: one[PASS])}
    found[PASS] = int(found[PASS] * hardware.activation_slack)
    found |= outlasting(spec, len(job.clients), participants)
    if hardware.kind == "cuda":
        for name in (COPY, HOST_MOMENTS):
            found.pop(name, None)  # lies in the host's memory
    return found
