"""Rank memory: what one rank of a world will hold, on its device and on its host.

One predictor serves the plan, the search and the advice, so that nothing is recommended which the plan would refuse.
"""

from __future__ import annotations

from dataclasses import replace

from fedmoe_ds.clients.local_training import Wave
from fedmoe_ds.federation.schedule import home_clients, largest_wave
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


def rank_memory(
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
    return {name: size for name, size in found.items() if hardware.kind == "cpu" or name not in ON_HOST}


def host_memory(job: Job, ep_size: int, hardware: Hardware, participants: int) -> dict[str, int]:
    """Bytes of rank 0 by purpose in the memory of its host, beside its device; empty where the host is what computes."""
    if hardware.kind == "cpu":
        return {}
    topology = job.config.topology.model_copy(update={"ep_size": ep_size, "clusters": None})
    spec = replace(job, config=job.config.model_copy(update={"topology": topology}))
    lasting = outlasting(spec, len(job.clients), participants)
    return {"process": int(hardware.host_baseline_bytes), **{name: lasting[name] for name in ON_HOST if name in lasting}}
