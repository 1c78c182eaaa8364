"""Rank memory: what one rank of a world will hold, on its device and on its host.

One predictor serves the plan, the search and the advice, so that nothing is recommended which the plan would refuse.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from fedmoe_ds.clients.local_training import Wave
from fedmoe_ds.federation.schedule import largest_wave
from fedmoe_ds.planner.client_state import client_state
from fedmoe_ds.planner.hardware import Hardware
from fedmoe_ds.planner.memory import COPY, HOST_MOMENTS, PASS, PERSONAL, estimate, outlasting
from fedmoe_ds.planner.workload import Job

ON_HOST = (PERSONAL, COPY, HOST_MOMENTS)
"""Purposes that lie in the host's memory where ranks compute on devices."""


def shared_passes(plan: list[list[Wave]]) -> set[tuple[int, float]]:
    """(clients of a rank, their mean number of active experts) of all passes that clients share.

    Rows of a whole wave meet at the experts, the same number on every rank of its cluster.
    """
    found = set()
    for wave in (wave for waves in plan for wave in waves):
        arriving = sum(client.cap for home in wave for client in home) / len(wave)
        found |= {(len(home), arriving / len(home)) for home in wave if home}
    return found


@dataclass(frozen=True)
class RankMemory:
    """Bytes of rank 0; the other ranks hold as much or less.

    Attributes:
        device: by purpose, where the rank computes.
        host: by purpose in its host's memory beside a device; empty where the host is what computes.
        client_files: of clients' own state that there is no room for in memory (`execution.client_state_gib`).
    """

    device: dict[str, int]
    host: dict[str, int]
    client_files: int


def rank_memory(
    job: Job,
    ep_size: int,
    in_flight: int | None,
    hardware: Hardware,
    participants: int,
    plan: list[list[Wave]] | None = None,
    clusters: int = 1,
) -> RankMemory:
    """What a rank holds.

    Args:
        plan: waves of every cluster, where a schedule is known; else all slots are taken by clients of the largest cap.
        clusters: how many there are, where no schedule says it; with one a rank keeps most of clients.
    """
    spec, here = _placed(job, ep_size, in_flight), None
    # A bank has slots for the largest wave of any cluster, as `wave_slots` says of a start.
    flight = min(in_flight or participants, participants)
    if plan is not None:
        flight, clusters, here = largest_wave(plan), len(plan), trained_here(plan)
    lasting = outlasting(spec, len(spec.clients), participants, clusters, here, flight)
    files = client_state(spec, len(spec.clients), participants, clusters, here).files
    device = {"process": int(hardware.baseline_bytes + hardware.main_extra_bytes), **_training(spec, flight, hardware, plan)}
    if hardware.kind == "cpu":
        return RankMemory(device | lasting, {}, files)
    host = {"process": int(hardware.host_baseline_bytes), **{name: lasting[name] for name in ON_HOST if name in lasting}}
    return RankMemory(device | {name: size for name, size in lasting.items() if name not in ON_HOST}, host, files)


def _training(spec: Job, flight: int, hardware: Hardware, plan: list[list[Wave]] | None) -> dict[str, int]:
    """Of weights, adapters and passes."""
    home = max(1, math.ceil(flight / spec.config.topology.ep_size))
    passes: set[tuple[int, float | None]] = {(home, None)}
    if not spec.shares_passes:
        passes = {(1, None)}
    elif plan is not None:
        passes = {*shared_passes(plan)} or passes
    held = (estimate(spec, home, spec.length, *each, in_flight=flight) for each in passes)
    # The pass with the largest activations decides; everything else is the same in all of them.
    found = max(held, key=lambda one: one[PASS])
    return found | {PASS: int(found[PASS] * hardware.activation_slack)}


def _placed(job: Job, ep_size: int, in_flight: int | None) -> Job:
    """The job with another topology and number of clients in flight."""
    topology = job.config.topology.model_copy(update={"ep_size": ep_size, "clusters": None})
    execution = job.config.execution.model_copy(update={"clients_in_flight": in_flight})
    return replace(job, config=job.config.model_copy(update={"topology": topology, "execution": execution}))


def trained_here(plan: list[list[Wave]]) -> int:
    """Clients of the cluster that trains most of them."""
    return max(sum(len(home) for wave in waves for home in wave) for waves in plan)
