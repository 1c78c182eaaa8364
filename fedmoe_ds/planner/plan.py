"""Plan: everything about one configuration in one world, as lines and as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedmoe_ds.config import Config
from fedmoe_ds.distributed.topology import check_layout
from fedmoe_ds.errors import UserError
from fedmoe_ds.methods.client_drift import keeps_variables
from fedmoe_ds.planner import text
from fedmoe_ds.planner.advice import advice
from fedmoe_ds.planner.evaluation import evaluation_seconds
from fedmoe_ds.planner.flops import tier_flops
from fedmoe_ds.planner.hardware import Hardware
from fedmoe_ds.planner.legality import check_world, host_shortage, idle_clusters, idle_ranks, shortage, tight
from fedmoe_ds.planner.prediction import Prediction, predict_job
from fedmoe_ds.planner.search import Choice, Refusal, search
from fedmoe_ds.planner.verify import Verified, verify
from fedmoe_ds.planner.workload import Job, resolve
from fedmoe_ds.planner.world import World


@dataclass(frozen=True)
class Plan:
    """Everything that `launch/plan.py` shows; `evaluation_s`: seconds of all evaluations of one seed."""

    job: Job
    world: World
    hardware: Hardware
    prediction: Prediction
    evaluation_s: float
    choices: list[Choice]
    refusals: list[Refusal]
    verified: Verified | None
    warnings: list[str]
    seeds: int

    @property
    def seed_seconds(self) -> float:
        """All rounds of one seed, each like round 1, and evaluation as often as the configuration asks for it."""
        # Round 1 stands for all rounds but in its evaluation, which comes as often as it is configured.
        trained = self.prediction.round_seconds - self.prediction.seconds["evaluate"]
        return self.job.config.federation.rounds * trained + self.evaluation_s

    def lines(self) -> list[str]:
        """For the terminal."""
        config = self.job.config
        ep_size = config.topology.ep_size
        parts = [
            text.heading(self.job, self.world, self.hardware) + [f"warning: {warning}" for warning in self.warnings],
            text.layout_lines(self.job, self.world, ep_size, self.prediction),
            text.memory_lines(self.prediction, self.hardware, self.world),
            text.round_lines(self.prediction, self.hardware.spread),
            text.flops_lines(self.job, tier_flops(self.job)),
            text.search_lines(self.choices, self.refusals, self.hardware.spread) if self.choices else [],
            text.study_lines(self.world, self.hardware, self.seed_seconds, config.federation.rounds, self.seeds),
            text.verify_lines(self.verified, self.world) if self.verified else [],
        ]
        # An empty line between parts, none after the last.
        return [line for part in parts if part for line in [*part, ""]][:-1]

    def data(self) -> dict[str, Any]:
        """For a JSON file."""
        chosen = self.prediction
        return {
            "ranks": self.world.ranks,
            "hosts": self.world.hosts,
            "hardware": self.hardware.name,
            "ep_size": self.job.config.topology.ep_size,
            "seconds": chosen.seconds,
            "train": chosen.train_split,
            "bytes": chosen.bytes,
            "memory": chosen.memory,
            "host_memory": chosen.host_memory,
            "client_files": chosen.client_files,
            "spread": list(self.hardware.spread),
            "ranks_without_clients": chosen.homeless,
            "balance": chosen.balance,
            "tokens": chosen.tokens,
            "flops": {tier.label: tier.total for tier in tier_flops(self.job)},
            "best": [
                {"clusters": c.clusters, "ep_size": c.ep_size, "clients_in_flight": c.in_flight,
                 "round_s": c.prediction.round_seconds, "memory": c.prediction.memory_total}
                for c in self.choices
            ],
            "refused": [refusal.reason for refusal in self.refusals],
            "seed_s": self.seed_seconds,
            # Ranks are paid for while they wait, so all of them count for the whole time.
            "rank_hours": self.seed_seconds / 3600 * self.world.ranks * self.seeds,
        }  # fmt: skip


def plan(
    config: Config, world: World, hardware: Hardware, seeds: int = 1, verify_ranks: str | None = None, searching: bool = True
) -> Plan:
    """Plan a run.

    Args:
        verify_ranks: None, `sample` or `all`: as which ranks the process groups are really built.
        searching: whether other topologies are tried.
    Raises:
        UserError: what a real start would refuse, and what does not fit into memory.
    """
    layout = check_layout(config.topology, world.ranks)
    job = resolve(config, kind=hardware.kind)
    # Before any prediction, which would divide experts unevenly.
    check_world(job, config.topology.ep_size, world)
    flight = config.execution.clients_in_flight
    first = predict_job(job, layout.ep_size, flight, world, hardware)
    drawn, available = len(job.participants(1)), hardware.available(world.ranks_per_host)
    evaluation_s = evaluation_seconds(job, layout.ep_size, world, hardware)
    choices, refusals = search(job, world, hardware) if searching else ([], [])
    check_memory(job, first, world, hardware)
    verified = None
    if verify_ranks is not None:
        ranks = list(range(world.ranks)) if verify_ranks == "all" else None
        kept = [block for block in job.blocks if block.personal] + job.method.client_state(job.blocks)
        personal = bool(kept) or keeps_variables(config.local)
        verified = verify(config.topology, layout, job.expert_layout.num_experts, ranks, hardware.kind, personal)
    warnings = [
        idle_clusters(layout.clusters, drawn),
        idle_ranks(first.homeless, world.ranks, layout.clusters, drawn),
        tight(first.memory_total, available),
    ]
    told = [warning for warning in warnings if warning]
    return Plan(job, world, hardware, first, evaluation_s, choices, refusals, verified, told, seeds)


def check_memory(job: Job, found: Prediction, world: World, hardware: Hardware) -> None:
    """Raise UserError where a rank or a host would hold more than there is, with what would help."""
    ep_size, flight = job.config.topology.ep_size, job.config.execution.clients_in_flight
    wrong = shortage(found.memory_total, hardware.available(world.ranks_per_host), ep_size, flight)
    if wrong is not None:
        raise UserError(f"{wrong}; {advice(job, ep_size, flight, world, hardware)}")
    wrong = host_shortage(sum(found.host_memory.values()), world.ranks_per_host, hardware.host_memory_bytes)
    if wrong is not None:
        raise UserError(wrong)
