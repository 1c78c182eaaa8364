"""Search: the best (clusters, ep_size, clients in flight) of a world, over every legal combination that fits its memory."""

from __future__ import annotations

from dataclasses import dataclass

from fedmoe_ds.errors import UserError
from fedmoe_ds.federation.sampling import participant_count
from fedmoe_ds.planner.hardware import Hardware
from fedmoe_ds.planner.legality import check_fits, legal_sizes
from fedmoe_ds.planner.prediction import Prediction, predict_job, predict_memory
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
    """All combinations that fit, fastest round first, and those that do not.

    Raises:
        UserError: nothing fits, or no ep_size is legal.
    """
    drawn = 1 if job.method.pooled else participant_count(len(job.clients), job.config.federation.participation)
    choices, refusals = [], []
    available = hardware.available(world.ranks_per_host)
    for ep_size in legal_sizes(world.ranks, job.expert_layout.num_experts):
        for flight in _flights(drawn, ep_size, world.ranks // ep_size):
            # Memory first: it is exact arithmetic, and a prediction of seconds draws and schedules a round.
            needed = sum(predict_memory(job, ep_size, flight, hardware, drawn).values())
            try:
                check_fits(needed, available, ep_size, flight)
            except UserError as refusal:
                refusals.append(Refusal(ep_size, flight, needed, str(refusal)))
                continue
            choices.append(Choice(world.ranks // ep_size, ep_size, flight, predict_job(job, ep_size, flight, world, hardware)))
    if not choices:
        least = min(refusals, key=lambda refusal: refusal.needed)
        raise UserError(f"no topology of {world.ranks} ranks fits; the smallest: {least.reason}")
    # Among equally fast ones the one that needs less memory.
    return sorted(choices, key=lambda choice: (choice.prediction.round_seconds, choice.prediction.memory_total)), refusals


def _flights(drawn: int, ep_size: int, clusters: int) -> list[int]:
    """Numbers of clients in flight worth a try: one per rank, doubled, up to all that a cluster can get."""
    # More slots than a cluster gets clients would only take memory.
    most = max(1, -(-drawn // clusters))
    found, flight = [], ep_size
    while flight < most:
        found.append(flight)
        flight *= 2
    return [*found, max(most, 1)]
