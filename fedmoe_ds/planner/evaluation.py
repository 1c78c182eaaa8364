"""Evaluation: seconds of scoring the budget tiers, after one round and over a whole run.

Exact match comes with the accuracy. A ranked choice is one more pass for each candidate, taken to be as long as the reference.
Generated answers are taken to be as long as they may be, with the whole reference in every pass: an upper bound.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np

from fedmoe_ds.federation.evaluation import SUMS
from fedmoe_ds.federation.evaluation_passes import most_together, passes
from fedmoe_ds.federation.schedule import wave_slots
from fedmoe_ds.model.client_slots import ClientSlots
from fedmoe_ds.planner.client_state import row_bytes
from fedmoe_ds.planner.counts import CONTROL
from fedmoe_ds.planner.exchanges import exchanged, hidden, parts_of
from fedmoe_ds.planner.hardware import Hardware
from fedmoe_ds.planner.lengths import Lengths
from fedmoe_ds.planner.network import Group, Network
from fedmoe_ds.planner.work import PassWork, Rows
from fedmoe_ds.planner.workload import Job
from fedmoe_ds.planner.world import World


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated after a round; `plain`: the foundation, before the first one.

    Attributes:
        due: whether anything is.
        per_client: whether every client's own hold-out is scored, too.
        generations: whether answers are generated, if there are to be any.
    """

    due: bool
    per_client: bool
    plain: bool
    generations: bool = False

    @classmethod
    def of(cls, job: Job, round_index: int) -> Evaluation:
        config, ends = job.config.evaluation, round_index in (0, job.config.federation.rounds)
        due = ends or round_index % config.every == 0
        asked = ends or (config.clients_every > 0 and round_index % config.clients_every == 0)
        return cls(due, due and asked and config.client_sequences > 0, round_index == 0, ends)


def evaluation_seconds(job: Job, ep_size: int, world: World, hardware: Hardware) -> float:
    """Seconds of all evaluations of a run, the foundation's included."""
    network, in_flight = Network(hardware, world), wave_slots(job, job.clients, world.ranks // ep_size)
    kinds = Counter(Evaluation.of(job, index) for index in range(job.config.federation.rounds + 1))
    return sum(
        count * one_evaluation_seconds(job, network, hardware, ep_size, kind, in_flight) for kind, count in kinds.items()
    )


def one_evaluation_seconds(
    job: Job, network: Network, hardware: Hardware, ep_size: int, asked: Evaluation, in_flight: int
) -> float:
    """Seconds of one evaluation: every tier on the global hold-out; where asked for, every client on its own.

    Args:
        in_flight: clients in flight on a cluster at most; hold-outs of as many share a pass.
    """
    if not asked.due:
        return 0.0
    config, personal = job.config.evaluation, job.method.personal_models and not asked.plain
    shared = _batches(job.data.global_holdout.head(config.max_sequences), config.batch_size)
    own = [job.data.holdout(c.index).head(config.client_sequences) for c in job.clients] if asked.per_client else []
    owners = [lengths for lengths in own if len(lengths.rows)]
    home = ClientSlots(in_flight, ep_size).most
    seconds, sums = 0.0, 0
    for members in job.by_tier.values():
        # The foundation is one model, whatever is trained beside it.
        runs, models = (
            len(members) if personal else 1,
            1 if asked.plain and job.method.views == 1 else job.cost.models(members[0]),
        )
        seconds += runs * models * _scored(job, network, hardware, ep_size, shared, members[0].cap)
        sums += runs * len(shared)
        if owners:
            # Personal models see their own clients' data only; the first so many owners stand for them.
            mine = owners[: len(members)] if job.method.personal_models else owners
            if not personal and job.shares_passes:
                longest = [int(part.rows.max()) for part in mine]
                cut = passes([len(part.rows) for part in mine], longest, most_together(job.config, home))
                mine = [_together([mine[place] for place in chosen]) for chosen in cut]
            seconds += models * _scored(job, network, hardware, ep_size, mine, members[0].cap)
            sums += len(mine)
    seconds *= 1 + job.data.candidates
    if not (personal or asked.plain):
        seconds += _means(job, network, ep_size)
    # Sums of each batch in float64, of all tiers in one message; a ring carries them once round and once back.
    seconds += network.control(Group.everyone(network.world), CONTROL.per_evaluation, 16 * SUMS * sums / network.world.ranks)
    if asked.generations and config.generations:
        seconds += _generated(job, network, hardware, ep_size)
    return seconds


def _means(job: Job, network: Network, ep_size: int) -> float:
    """Rows of every tier's clients, whose mean is its model's, where they are at home in several clusters."""
    group, clusters = Group.shard(network.world, ep_size), network.world.ranks // ep_size
    row = row_bytes([block for block in job.blocks if block.personal], job.expert_layout.num_experts // ep_size)
    if not row or clusters == 1:
        return 0.0
    return sum(network.all_gather(group, 1, row * math.ceil(len(members) / clusters)) for members in job.by_tier.values())


def _generated(job: Job, network: Network, hardware: Hardware, ep_size: int) -> float:
    """One pass for each token of an answer, by the largest tier, and the ranks' agreement to go on."""
    config, members = job.config.evaluation, next(iter(job.by_tier.values()))
    samples = job.data.global_holdout.head(config.generations)
    asked = Lengths(samples.rows + config.max_new_tokens, np.ones_like(samples.targets))
    batches = _batches(asked, config.batch_size)
    if not batches:
        return 0.0
    seconds = job.cost.models(members[0]) * _scored(job, network, hardware, ep_size, batches, members[0].cap)
    turns = math.ceil(len(batches) / network.world.ranks)
    return config.max_new_tokens * (seconds + turns * network.control(Group.everyone(network.world), 1, 8))


def _together(parts: list[Lengths]) -> Lengths:
    return Lengths(np.concatenate([part.rows for part in parts]), np.concatenate([part.targets for part in parts]))


def _batches(lengths: Lengths, size: int) -> list[Lengths]:
    starts = range(0, len(lengths.rows), size)
    return [Lengths(lengths.rows[s : s + size], lengths.targets[s : s + size]) for s in starts]


def _scored(job: Job, network: Network, hardware: Hardware, ep_size: int, batches: list[Lengths], cap: int) -> float:
    """Forward passes over batches that are dealt to all ranks of the world, turn by turn."""
    world = network.world
    compute = hardware.crowded(world.ranks_per_host)
    work = PassWork(job, training=False)
    turns = math.ceil(len(batches) / world.ranks)
    samples = np.array([len(batch.rows) for batch in batches], dtype=np.float64)
    # A batch is padded to its longest sequence.
    longest = np.array([batch.rows.max() for batch in batches], dtype=np.float64)
    targets = np.array([batch.targets.sum() for batch in batches], dtype=np.float64)
    rows = np.array([batch.rows.sum() for batch in batches], dtype=np.float64) * cap * job.expert_layout.real_share
    packed = np.array([batch.rows.sum() for batch in batches], dtype=np.float64) if job.config.execution.packing else None
    home = np.asarray(work.seconds(work.home(Rows(samples, longest, targets, packed)), compute))
    home, rows = (np.pad(x, (0, turns * world.ranks - len(batches))).reshape(turns, -1) for x in (home, rows))
    fixed = work.seconds(work.fixed(), compute)
    local = job.expert_layout.num_experts // ep_size
    # Routed rows are taken to be even over the ranks of a cluster.
    arriving = rows.reshape(turns, -1, ep_size).mean(2).repeat(ep_size, 1)
    parts = parts_of(job, ep_size)
    products = np.asarray(work.seconds(work.experts(arriving, ep_size, local, parts), compute))
    busy = home + fixed + products
    cores = hardware.slots if hardware.kind == "cpu" else world.ranks_per_host
    # A host is done when its cores have done the work of all its ranks.
    crowded = busy.reshape(turns, world.hosts, -1).sum(2).max(1) / cores
    seconds = float(np.maximum(busy.max(1), crowded).sum())
    group, expert_layout = Group.cluster(world, ep_size), job.expert_layout
    if not expert_layout.layers:
        return seconds
    calls, numbers = exchanged(job, False, float(rows.sum()) / world.ranks / turns, parts)
    size = numbers * max(job.size.bytes_per_parameter, 2) + len(expert_layout.layers) * expert_layout.num_experts * 8
    travelling = network.all_to_all(group, calls * turns, size / calls)
    of_rows = travelling * (1.0 - len(expert_layout.layers) / calls)
    return seconds + travelling - float(hidden(job, parts, of_rows, products.max(1).sum()))
