"""Search: the best (clusters, ep_size, clients in flight) of a world, over every legal combination that fits its memory."""

from __future__ import annotations

from dataclasses import dataclass

from fedmoe_ds.errors import UserError
from fedmoe_ds.federation.sampling import participant_count
from fedmoe_ds.planner.advice import advice
from fedmoe_ds.planner.client_costs import ClientCosts
from fedmoe_ds.planner.hardware import Hardware
from fedmoe_ds.planner.legality import HEADROOM, host_shortage, legal_sizes, shortage
from fedmoe_ds.planner.prediction import Prediction, predict_job
from fedmoe_ds.planner.workload import Job
from fedmoe_ds.planner.world import World


@dataclass(frozen=True)
class Choice:
    """One combination and what it takes."""

    clusters: int
    ep_size: int
    in_flight: int
    prediction: Prediction


@dataclass(frozen=True)
class Refusal:
    """A legal combination that does not fit."""

    ep_size: int
    in_flight: int
    needed: int
    reason: str


def search(job: Job, world: World, hardware: Hardware) -> tuple[list[Choice], list[Refusal]]:
    """All combinations that fit with room to spare, fastest round first, and those that do not.

    Raises:
        UserError: nothing fits, or no ep_size is legal.
    """
    choices, refusals = try_all(job, world, hardware)
    if not choices:
        least = smallest(refusals)
        help_ = advice(job, least.ep_size, least.in_flight, world, hardware)
        raise UserError(f"no topology of {world.ranks} ranks fits; the smallest: {least.reason}; {help_}")
    return choices, refusals


def try_all(job: Job, world: World, hardware: Hardware) -> tuple[list[Choice], list[Refusal]]:
    """The same, whether or not any fits. What is configured is tried too, so that nothing slower can be called the best."""
    drawn = 1 if job.method.pooled else participant_count(len(job.clients), job.config.federation.participation)
    choices, refusals = list[Choice](), list[Refusal]()
    configured = (job.config.topology.ep_size, job.config.execution.clients_in_flight)
    available = hardware.available(world.ranks_per_host)
    costs = ClientCosts.of(job, hardware, world.ranks_per_host, 1)
    for ep_size in legal_sizes(world.ranks, job.expert_layout.num_experts):
        for flight in _flights(job, drawn, ep_size, world.ranks // ep_size):
            # A wave for each client takes longest to run and to plan: one in flight is for where no more fit.
            fits = any(choice.ep_size == ep_size for choice in choices)
            if flight == 1 < ep_size and fits and (ep_size, flight) != configured:
                continue
            found = predict_job(job, ep_size, flight, world, hardware, costs=costs)
            # The plan's own figure, and less of the card than the plan accepts: a recommendation must not be what fails.
            wrong = shortage(found.memory_total, available, ep_size, flight, HEADROOM)
            wrong = wrong or host_shortage(sum(found.host_memory.values()), world.ranks_per_host, hardware.host_memory_bytes)
            if wrong is None:
                choices.append(Choice(world.ranks // ep_size, ep_size, flight, found))
            else:
                refusals.append(Refusal(ep_size, flight, found.memory_total, wrong))
    # Among equally fast ones the one that needs less memory.
    choices.sort(key=lambda choice: (choice.prediction.round_seconds, choice.prediction.memory_total))
    return choices, refusals


def smallest(refusals: list[Refusal]) -> Refusal:
    """The combination that came closest to fitting."""
    return min(refusals, key=lambda refusal: refusal.needed)


def _flights(job: Job, drawn: int, ep_size: int, clusters: int) -> list[int]:
    """Numbers of clients in flight worth a try: one per rank, doubled, up to a cluster's share, what is configured, and one."""
    # More slots than a cluster gets clients would only take memory.
    most = max(1, -(-drawn // clusters))
    # One comes last. It is the least that a cluster can hold: what does not fit with it does not fit at all.
    found, flight = {1, most}, ep_size
    while flight < most:
        found.add(flight)
        flight *= 2
    asked = job.config.execution.clients_in_flight
    if ep_size == job.config.topology.ep_size and asked is not None and asked < most:
        found.add(asked)
    return [*sorted(found - {1}), 1]
