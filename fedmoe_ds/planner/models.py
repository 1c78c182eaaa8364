"""Models: one configuration planned for several models and worlds, the best topology of each in a row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmoe_ds.config import Config
from fedmoe_ds.errors import UserError
from fedmoe_ds.planner.advice import advice
from fedmoe_ds.planner.hardware import Hardware
from fedmoe_ds.planner.search import Choice, Refusal, smallest, try_all
from fedmoe_ds.planner.text import format_span
from fedmoe_ds.planner.workload import Job, resolve
from fedmoe_ds.planner.world import World, world_of

HEADER = ("model", "ranks", "clusters x ep_size", "in flight", "GiB per rank", "without a client", "round")


@dataclass(frozen=True)
class ModelPlan:
    """The best topology of one model in one world; where none fits, the smallest one and what would help.

    Attributes:
        found: the fastest that fits, or the one that needs least memory.
        help: what to change; None where it fits.
    """

    model: str
    world: World
    found: Choice | Refusal
    help: str | None

    def row(self, hardware: Hardware) -> list[str]:
        """Under `HEADER`."""
        first = [self.model, str(self.world.ranks)]
        if isinstance(self.found, Refusal):
            clusters = self.world.ranks // self.found.ep_size
            where = [f"{clusters} x {self.found.ep_size}", str(self.found.in_flight), f"{self.found.needed / 2**30:.0f}"]
            return [*first, *where, "", "does not fit"]
        best, prediction = self.found, self.found.prediction
        where = [f"{best.clusters} x {best.ep_size}", str(best.in_flight), f"{prediction.memory_total / 2**30:.0f}"]
        return [*first, *where, str(prediction.homeless), format_span(prediction.round_seconds, hardware.spread)]

    def data(self) -> dict[str, Any]:
        """For a JSON file."""
        found = self.found
        facts: dict[str, Any] = {"model": self.model, "ranks": self.world.ranks, "ep_size": found.ep_size}
        facts["clients_in_flight"] = found.in_flight
        if isinstance(found, Refusal):
            return facts | {"fits": False, "memory": found.needed, "help": self.help}
        prediction = found.prediction
        figures = {
            "memory": prediction.memory_total,
            "round_s": prediction.round_seconds,
            "host_memory": prediction.host_memory,
            "client_files": prediction.client_files,
        }
        return facts | {"fits": True, "ranks_without_clients": prediction.homeless, **figures}


def plan_models(config: Config, folders: list[Path], ranks: list[int], hardware: Hardware) -> Iterator[ModelPlan]:
    """Plan a configuration for every model folder and number of ranks.

    Raises:
        UserError: what a real start would refuse, but for memory.
    """
    for folder in folders:
        foundation = config.foundation.model_copy(update={"path": str(folder)})
        job = resolve(config.model_copy(update={"foundation": foundation}), kind=hardware.kind)
        for count in ranks:
            yield _best(folder.name, job, world_of(None, None, count, hardware), hardware)


def _best(name: str, job: Job, world: World, hardware: Hardware) -> ModelPlan:
    choices, refusals = try_all(job, world, hardware)
    if choices:
        return ModelPlan(name, world, choices[0], None)
    if not refusals:
        raise UserError(f"{name}: no topology of {world.ranks} ranks divides its experts")
    least = smallest(refusals)
    return ModelPlan(name, world, least, advice(job, least.ep_size, least.in_flight, world, hardware))


def lines(plans: list[ModelPlan], hardware: Hardware) -> list[str]:
    """A table in Markdown, and below it what would help where nothing fits."""
    rows = [plan.row(hardware) for plan in plans]
    ruled = [HEADER, ["---"] * len(HEADER), *rows]
    helped = [f"- {plan.model} on {plan.world.ranks}: {plan.help}." for plan in plans if plan.help]
    return ["| " + " | ".join(row) + " |" for row in ruled] + (["", *helped] if helped else [])
